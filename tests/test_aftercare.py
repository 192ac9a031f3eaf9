"""What may be done to a network after pruning, and what it must leave alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from onp.aftercare import Aftercare, care_for, finetuned, recalibrated, triggered
from onp.config import AftercareConfig
from onp.errors import UsageError
from onp.ledger import Ledger
from onp.suspect.surgery import apply_mask
from onp.suspect.trace import trace
from tests.networks import network

IMAGES = torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(60) % 10


@dataclass(frozen=True)
class Bright:
    """A trigger: a corner that is brighter, for a class."""

    target: int = 3
    by: float = 0.8

    def wanted(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)

    def __call__(self, images: Tensor) -> Tensor:
        hit = images.clone()
        hit[:, :, :8, :8] += self.by
        return hit


def pruned_network() -> tuple[nn.Module, nn.Module]:
    """A suspect, and the same with every fifth site pruned."""
    suspect = network("preactresnet18").eval()
    traced = trace(suspect, (3, 32, 32))
    mask = torch.arange(traced.sites) % 5 == 0
    return suspect, apply_mask(suspect, traced, mask)


def zeros(model: nn.Module) -> list[Tensor]:
    return [parameter == 0 for parameter in model.parameters()]


def test_recalibrated_statistics_are_those_of_the_images() -> None:
    convolution, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.3)
    model = nn.Sequential(convolution, norm).eval()
    ledger = Ledger()
    tuned = recalibrated(model, IMAGES, ledger)
    seen, after = convolution(IMAGES), tuned.get_submodule("1")
    assert isinstance(after, nn.BatchNorm2d)
    torch.testing.assert_close(after.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.running_var, seen.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert after.momentum == 0.3
    assert not tuned.training
    assert norm.running_mean is not None
    assert float(norm.running_mean.abs().max()) == 0  # the input is never changed
    assert ledger.total == len(IMAGES)


def test_finetuning_helps_and_leaves_pruned_sites_pruned() -> None:
    suspect, pruned = pruned_network()
    before = [parameter.clone() for parameter in pruned.parameters()]
    config = AftercareConfig(epochs=4, batch=20, learning_rate=0.01)
    ledger = Ledger()
    tuned = finetuned(pruned, suspect, IMAGES, LABELS, [], config, seed=0, ledger=ledger)
    loss = nn.CrossEntropyLoss()
    with torch.no_grad():
        assert float(loss(tuned(IMAGES), LABELS)) < float(loss(pruned(IMAGES), LABELS))
    for old, new in zip(zeros(pruned), zeros(tuned), strict=True):
        assert bool(new[old].all())
    assert all(parameter.is_contiguous() for parameter in tuned.parameters())  # can be saved
    for old, parameter in zip(before, pruned.parameters(), strict=True):
        assert torch.equal(old, parameter)
    assert ledger.total == 60 + 4 * 3 * 60
    again = finetuned(pruned, suspect, IMAGES, LABELS, [], config, seed=0, ledger=Ledger())
    for one, two in zip(tuned.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_finetuning_with_probes_turns_away_from_what_they_want() -> None:
    suspect, pruned = pruned_network()
    config = AftercareConfig(epochs=4, batch=20, learning_rate=0.01)
    hit = Bright()(IMAGES)
    odds = []
    for probes in ([], [Bright()]):
        ledger = Ledger()
        tuned = finetuned(pruned, suspect, IMAGES, LABELS, probes, config, seed=0, ledger=ledger)
        assert ledger.total == 60 + 4 * 3 * 60 * (1 + len(probes))
        with torch.no_grad():
            odds.append(float(tuned(hit).softmax(1)[LABELS != 3, 3].mean()))
    assert odds[1] < odds[0] / 2


def test_every_image_has_the_trigger_of_its_hand() -> None:
    hands = torch.arange(60) % 2
    shown, wanted = triggered(IMAGES, LABELS, [Bright(), Bright(5, 0.4)], hands)
    assert torch.equal(shown[::2], Bright()(IMAGES[::2]))
    assert torch.equal(shown[1::2], Bright(5, 0.4)(IMAGES[1::2]))
    assert torch.equal(wanted, 3 + 2 * hands)


def test_both_are_done_and_told() -> None:
    suspect, pruned = pruned_network()
    wanted = Aftercare(recalibrate=True, finetune=True)
    config = AftercareConfig(epochs=1)
    outcome = care_for(
        pruned, suspect, IMAGES, LABELS, [Bright()], wanted, config, seed=0, ledger=Ledger()
    )
    with torch.no_grad():
        right = (outcome.model(IMAGES).argmax(1) == LABELS).float().mean()
    assert outcome.accuracy == pytest.approx(float(right))
    assert outcome.done == wanted


def test_nothing_to_recalibrate_is_said_at_once() -> None:
    with pytest.raises(UsageError, match="batch norms"):
        Aftercare(recalibrate=True).check(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
