"""Masking as the executor, as weights and as a smaller network is one and the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from onp.errors import UntraceableModel
from onp.suspect.network import FrozenNetwork
from onp.suspect.surgery import apply_mask, check_writable, remove_mask
from onp.suspect.trace import Trace, trace
from tests.networks import BUILDERS, hooked_logits, network

TOLERANCE = 1e-4


def random_mask(traced: Trace, seed: int) -> Tensor:
    """Scattered sites and some whole groups, so that both kinds of pruning happen."""
    random = torch.Generator().manual_seed(seed)
    pruned = torch.rand(traced.sites, generator=random) < 0.1
    groups = int(traced.group_of_site.max()) + 1
    cut = torch.rand(groups, generator=random) < 0.2
    return pruned | cut[traced.group_of_site]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 33)], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_form_of_a_mask_gives_the_same_logits(name: str, size: tuple[int, int]) -> None:
    model = network(name, size=size)
    traced = trace(model, (3, *size))
    pruned = random_mask(traced, seed=1)
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = hooked_logits(model, traced, pruned, images)
    with torch.no_grad():
        plain = model(images)
        gated = FrozenNetwork(traced, model)(images, (~pruned).float())
        applied = apply_mask(model, traced, pruned)(images)
        smaller, stayed = remove_mask(model, traced, pruned)
        removed = smaller(images)
    assert (expected - plain).abs().max() > 10 * TOLERANCE  # the mask matters
    torch.testing.assert_close(gated, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(applied, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(removed, expected, rtol=0, atol=TOLERANCE)
    count = sum(p.numel() for p in smaller.parameters())
    assert count < sum(p.numel() for p in model.parameters())
    assert 0 <= stayed < int(pruned.sum())


@pytest.mark.parametrize("name", BUILDERS)
def test_removing_everything_keeps_a_channel_per_layer(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    smaller, stayed = remove_mask(model, traced, torch.ones(traced.sites, dtype=torch.bool))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(images), apply_mask(model, traced, torch.ones(traced.sites).bool())(images)
        )
    assert stayed > 0


class _Counts(nn.Module):
    """Code that counts the channels of a convolution, or asks for their number."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.conv, self.next, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        channels = x.shape[1] if self.asks else 8
        x = self.next(x.view(-1, channels, 36).unflatten(2, (6, 6)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("asks", [True, False])
def test_channels_that_the_code_counts_are_only_zeroed(asks: bool) -> None:
    torch.manual_seed(0)
    model = _Counts(asks).eval()
    traced = trace(model, (3, 8, 8))
    pruned = torch.zeros(traced.sites, dtype=torch.bool)
    pruned[:3] = True  # of the convolution's eight
    smaller, stayed = remove_mask(model, traced, pruned)
    assert stayed == (0 if asks else 3)
    assert smaller.get_submodule("conv").weight.shape[0] == (5 if asks else 8)  # type: ignore[union-attr]
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(images), hooked_logits(model, traced, pruned, images), rtol=1e-4, atol=1e-5
        )


def test_an_empty_mask_changes_nothing() -> None:
    model = network("resnet18")
    traced = trace(model, (3, 32, 32))
    nothing = torch.zeros(traced.sites, dtype=torch.bool)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller, stayed = remove_mask(model, traced, nothing)
    assert stayed == 0
    for key, value in smaller.state_dict().items():
        assert torch.equal(value, before[key])


def parametrised(norms: bool) -> nn.Module:
    """The second convolution's weights are made for every pass."""
    torch.manual_seed(0)
    second = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    between = nn.BatchNorm2d(8) if norms else nn.Identity()
    end = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.ReLU(), second, *end).eval()


def test_parametrised_weights_are_cut_as_what_they_are() -> None:
    model = parametrised(norms=True)
    traced = trace(model, (3, 8, 8))
    check_writable(model, traced)
    pruned = torch.zeros(traced.sites, dtype=torch.bool)
    pruned[[1, 2]] = True  # of the first layer, whose norm takes the mask
    images = torch.rand(4, 3, 8, 8)
    smaller, _ = remove_mask(model, traced, pruned)
    with torch.no_grad():
        expected = apply_mask(model, traced, pruned)(images)
        torch.testing.assert_close(smaller(images), expected, rtol=1e-4, atol=1e-5)
    assert smaller.get_submodule("3").weight.shape == (8, 6, 3, 3)
    assert "3.parametrizations.weight.original0" in model.state_dict()


def test_a_mask_that_a_parametrisation_would_undo_is_refused() -> None:
    model = parametrised(norms=False)
    with pytest.raises(UntraceableModel, match="3 is parametrised"):
        check_writable(model, trace(model, (3, 8, 8)))
