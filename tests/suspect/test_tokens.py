"""Transformers and the like in the many words that people write them in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import UntraceableModel
from onp.suspect.network import FrozenNetwork
from onp.suspect.surgery import apply_mask, remove_mask
from onp.suspect.trace import trace
from tests.networks import hooked_logits

WIDTH, HEADS, TOKENS = 12, 3, 9

Split = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _permuted(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _chunked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def heads(part: Tensor) -> Tensor:
        return part.unflatten(2, (HEADS, 4)).transpose(1, 2)

    q, k, v = qkv.chunk(3, dim=-1)
    return heads(q), heads(k), heads(v)


def _head_by_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one head stand together."""
    heads = qkv.view(qkv.shape[0], -1, HEADS, 12).transpose(1, 2)
    return heads[..., :4], heads[..., 4:8], heads[..., 8:]


def _one_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.split(qkv, WIDTH, dim=2)
    return q, k, v


class _Transformer(nn.Module):
    """One block: patches of 4 x 4 by a strided convolution, attention, a SiLU MLP."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.split = split
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.position = nn.Parameter(torch.randn(WIDTH, 1, TOKENS))
        self.registers = nn.Parameter(torch.randn(2, WIDTH))
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.SiLU(), nn.Linear(20, WIDTH))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(x.shape[0], WIDTH, -1) + self.position.squeeze(1)
        x = x.permute(0, 2, 1)
        registers = self.registers.unsqueeze(0).repeat(x.size(0), 1, 1)
        x = torch.concat((registers[:, :1], x, registers[:, 1:]), dim=1)
        y = F.scaled_dot_product_attention(*self.split(self.qkv(self.before(x))), scale=0.4)
        if self.split is not _one_head:
            y = y.transpose(1, 2).flatten(2)
        x = x + self.out(y) * self.scale
        x = x + self.mlp(self.after(x))
        return self.head(F.layer_norm(x[:, 1:-1], (WIDTH,)).mean(dim=-2))  # type: ignore[no-any-return]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("split", [_permuted, _chunked, _head_by_head, _one_head])
def test_heads_and_tokens_are_found_in_any_words(split: Split, images: Tensor) -> None:
    torch.manual_seed(0)
    model = _Transformer(split).eval()
    traced = trace(model, (3, 12, 12))
    pruned = torch.rand(traced.sites) < 0.3
    with torch.no_grad():
        frozen = FrozenNetwork(traced, model)
        torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-5)
        expected = hooked_logits(model, traced, pruned, images)
        smaller, _ = remove_mask(model, traced, pruned)
        for got in (
            frozen(images, (~pruned).float()),
            apply_mask(model, traced, pruned)(images),
            smaller(images),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    hidden = [layer for layer in traced.layers if layer.name == "mlp.0:out"]
    assert [layer.channels for layer in hidden] == [20]
    kept = int((~pruned[hidden[0].sites]).sum())
    assert smaller.get_submodule("mlp.0").weight.shape == (kept, WIDTH)  # type: ignore[union-attr]


def test_an_attentions_channels_are_those_of_its_values() -> None:
    torch.manual_seed(0)
    model = _Transformer(_head_by_head).eval()
    traced = trace(model, (3, 12, 12))
    layer = next(layer for layer in traced.layers if layer.name == "qkv:out")
    rows = traced.channels.of_value[layer.producers[0]]
    got = [rows.tolist().index(c) for c in traced.channels.of_value[layer.value].tolist()]
    assert got == [8, 9, 10, 11, 20, 21, 22, 23, 32, 33, 34, 35]
    assert traced.shapes[layer.value] == (WIDTH, TOKENS + 2)


def test_gradients_reach_images_and_gates(images: Tensor) -> None:
    torch.manual_seed(0)
    model = _Transformer(_chunked).eval()
    traced = trace(model, (3, 12, 12))
    x = images.requires_grad_(True)
    gates = torch.ones(len(x), traced.sites, requires_grad=True)
    FrozenNetwork(traced, model)(x, gates).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert gates.grad is not None
    for layer in traced.layers:
        assert gates.grad[:, layer.sites].abs().sum() > 0, layer.name


def test_constants_are_read_from_the_weights_that_are_run(images: Tensor) -> None:
    """A trace serves other weights of the same network: those after unlearning."""
    torch.manual_seed(0)
    model, other = _Transformer(_permuted).eval(), _Transformer(_permuted).eval()
    traced = trace(model, (3, 12, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            FrozenNetwork(traced, other)(images), other(images), rtol=1e-4, atol=1e-5
        )


class _Normed(nn.Module):
    """A layer norm whose channel is all that one class's logit reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).movedim(1, -1)).mean((1, 2)))  # type: ignore[no-any-return]


def test_channels_under_a_layer_norm_are_zeroed_never_cut(images: Tensor) -> None:
    torch.manual_seed(0)
    model = _Normed().eval()
    traced = trace(model, (3, 12, 12))
    pruned = torch.tensor([True, False, False, True, False, False])
    applied = apply_mask(model, traced, pruned)
    assert applied.norm.weight[pruned].tolist() == [0.0, 0.0]  # type: ignore[index,union-attr]
    smaller, stayed = remove_mask(model, traced, pruned)
    assert stayed == 2
    assert smaller.conv.weight.shape == model.conv.weight.shape  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(images), hooked_logits(model, traced, pruned, images), rtol=1e-4, atol=1e-5
        )


class _Body(nn.Module):
    """A network whose middle is the given function of a map [N, 4, 6, 6]."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle
        self.conv, self.head, self.mix = nn.Conv2d(3, 4, 7), nn.Linear(4, 2), nn.Linear(36, 36)
        self.norm = nn.LayerNorm(36)
        self.table = nn.Parameter(torch.rand(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, self.conv(x)))  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "tokens mixed by a linear layer": (
        lambda net, x: net.mix(x.flatten(2)).mean(2),  # type: ignore[operator]
        "mix: must read its channels last",
    ),
    "norm over positions": (
        lambda net, x: net.norm(x.flatten(2)).mean(2),  # type: ignore[operator]
        "norm: must read its channels last",
    ),
    "channels into positions": (
        lambda net, x: F.relu(x.view(-1, 8, 18).transpose(1, 2)[:, :, :4]).mean(1),
        "takes channels apart or mixes them",
    ),
    "quotient of two values": (
        lambda net, x: (x / F.relu(x)).mean((2, 3)),
        "div of two image values",
    ),
    "a number for each position": (
        lambda net, x: (x * x.sigmoid()[:, :1]).mean((2, 3)),
        "mul must be of two values of one shape",
    ),
    "attention with a mask": (
        lambda net, x: F.scaled_dot_product_attention(
            *[x.flatten(2).transpose(1, 2)] * 3, is_causal=True
        ).mean(1),
        "attention with is_causal",
    ),
    "softmax of no scores": (
        lambda net, x: x.softmax(1).mean((2, 3)),
        "a softmax must be of an attention's scores",
    ),
    "softmax over the queries": (
        lambda net, x: (
            (x.flatten(2).mT @ x.flatten(2)).softmax(1) @ x.flatten(2).transpose(1, 2)
        ).mean(1),
        "a softmax must be of an attention's scores",
    ),
    "scores without a softmax": (
        lambda net, x: (x.flatten(2).mT @ x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean(1),
        "scores must go through a softmax",
    ),
    "another product of matrices": (
        lambda net, x: (x @ x).mean((2, 3)),
        "only products of an attention's queries and keys",
    ),
    "pixels chosen by the image": (
        lambda net, x: x.flatten(2)[:, :, x.flatten(1).argmax(1) % 36].mean(2),
        "argmax",
    ),
    "constants for each image": (
        lambda net, x: x.mean((2, 3)) + net.table,
        "a constant must hold one number per channel or position",
    ),
    "positions concatenated": (
        lambda net, x: torch.cat([x, x], 2).mean((2, 3)),
        "only channels, or one value's tokens and constants",
    ),
    "rounded division": (
        lambda net, x: torch.div(x, 2, rounding_mode="floor").mean((2, 3)),
        "div with keywords",
    ),
    "mean over some positions": (lambda net, x: x.mean(2)[:, :, 0], "mean over all positions"),
    "split as a whole": (
        lambda net, x: torch.cat(x.chunk(2, 1), 1).mean((2, 3)),
        "cat: must list its tensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_channel_is_refused_by_name(case: str) -> None:
    middle, message = REFUSED[case]
    with pytest.raises(UntraceableModel, match=message):
        trace(_Body(middle).eval(), (3, 12, 12))
