"""Margins are driven as far as images reach, whatever the range, and cost what is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onp.clean import Clean
from onp.ledger import Ledger
from onp.probes.margin import MOST, PRIOR, largest_margins, margins_of
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace

CLASSES = 18
"""More than are driven together."""


def linear_network() -> tuple[FrozenNetwork, Tensor]:
    """Logits that are linear in the pixels [2, 3, 4], as a rectifier in front passes all of them;
    and their weights [18, 24]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), nn.Flatten(),
                          nn.Linear(24, CLASSES, bias=False))  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
    return FrozenNetwork(trace(model.eval(), (2, 3, 4)), model), model[3].weight.detach()


def clean_images(network: FrozenNetwork, count: int = 40) -> Clean:
    images = torch.rand(count, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = network(images, None)
    labels = torch.arange(count) % (CLASSES - 1)  # none of the last class
    return Clean(images, labels, logits.log_softmax(1))


@pytest.mark.parametrize("classes", [list(range(CLASSES)), [5, 2], [17]], ids=len)
def test_noise_is_driven_as_far_as_images_reach(classes: list[int]) -> None:
    network, weights = linear_network()
    clean, ledger = clean_images(network), Ledger()
    found = largest_margins(
        network, clean, classes, steps=60, starts=2, valid=(0.0, 1.0), seed=3, ledger=ledger
    )
    for place, target in enumerate(classes):
        # Over every other class alone the margin is at most the sum of what favours the target.
        bounds = (weights[target] - weights).clamp_min(0).sum(1)
        bound = float(bounds[torch.arange(CLASSES) != target].min())
        assert 0.6 * bound < float(found.driven[place]) <= bound + 1e-5
    assert list(found.classes) == classes
    assert ledger.total == (2 * 60 + 1) * 2 * len(classes)


def test_natural_margins_are_means_over_the_class() -> None:
    network, _ = linear_network()
    clean = clean_images(network)
    found = largest_margins(
        network, clean, range(CLASSES), steps=1, starts=1, valid=(0.0, 1.0), seed=0, ledger=Ledger()
    )
    with torch.no_grad():
        logits = network(clean.images, None)
    sure = [
        max(float(row[label] - torch.cat([row[:label], row[label + 1 :]]).max()), 0.0)
        for row, label in zip(logits, clean.labels.tolist(), strict=True)
    ]
    for target in range(CLASSES - 1):
        own = [one for one, label in zip(sure, clean.labels, strict=True) if label == target]
        mean = (sum(own) + PRIOR * sum(sure) / len(sure)) / (len(own) + PRIOR)
        assert float(found.natural[target]) == pytest.approx(mean, abs=1e-5)
    assert float(found.natural[CLASSES - 1]) == float("inf")


def test_the_range_only_scales() -> None:
    network, _ = linear_network()
    clean = clean_images(network)
    plain, wide = (
        largest_margins(
            network, clean, [0, 1, 2], steps=8, starts=2, valid=(0.0, high), seed=0, ledger=Ledger()
        )
        for high in (1.0, 4.0)
    )
    assert torch.allclose(wide.driven, 4 * plain.driven, rtol=1e-4)


def test_noise_lies_and_stays_in_the_range() -> None:
    network, weights = linear_network()
    clean, low, high = clean_images(network), 2.0, 2.5
    found = largest_margins(
        network, clean, [0, 1], steps=60, starts=2, valid=(low, high), seed=0, ledger=Ledger()
    )
    for target in (0, 1):
        others = weights[target] - weights[torch.arange(CLASSES) != target]
        bounds = (others.clamp_min(0) * high + others.clamp_max(0) * low).sum(1)
        middle = float((others.sum(1) * (low + high) / 2).min())
        assert middle < float(found.driven[target]) <= float(bounds.min()) + 1e-4


@pytest.mark.parametrize(("scale", "driven"), [(1e30, -MOST), (1e38, -MOST), (torch.nan, -MOST)])
def test_margins_are_numbers_whatever_the_network_says(scale: float, driven: float) -> None:
    network, _ = linear_network()
    clean = clean_images(network)
    loud = lambda images, gates: network(images, gates) * scale * 10  # noqa: E731
    loud.device = network.device  # type: ignore[attr-defined]
    found = largest_margins(
        loud, clean, [0, 1], steps=20, starts=1, valid=(0.0, 1.0), seed=0, ledger=Ledger()
    )  # type: ignore[arg-type]
    assert bool(found.driven.isfinite().all())
    assert float(found.driven.max()) == pytest.approx(driven)


def test_same_seed_same_margins_another_other_ones() -> None:
    network, _ = linear_network()
    clean = clean_images(network)
    first, again, other = (
        largest_margins(
            network, clean, [0, 1], steps=2, starts=1, valid=(0.0, 1.0), seed=seed, ledger=Ledger()
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.driven, again.driven)
    assert not torch.equal(first.driven, other.driven)


def test_a_margin_is_over_the_largest_other_class() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, -1.0, 4.0]])
    assert margins_of(logits, torch.tensor([0, 1])).tolist() == [0.5, -5.0]
    alike = margins_of(logits.log_softmax(1), torch.tensor([0, 1]))
    assert alike.tolist() == pytest.approx([0.5, -5.0], abs=1e-6)
