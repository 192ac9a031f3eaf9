"""Copies of few clean images: which are made, which are kept, and where they are not needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onp.clean import Clean
from onp.config import Config, CopiesConfig
from onp.copies import moved, with_copies
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.probes.responses import activations
from onp.scene import Scene
from onp.suspect.trace import trace
from tests.agent.test_agent import SIZE, toy

STILL = CopiesConfig(shift=0, turn=0, scale=0, light=0)
VALID = (0.0, 1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def few(count: int) -> tuple[Clean, MaskEvaluator]:
    model, images, labels, _ = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model, ledger=Ledger())
    return Clean.seen_by(evaluator, images[:count], labels[:count]), evaluator


def copied(clean: Clean, evaluator: MaskEvaluator, config: CopiesConfig, seed: int = 0) -> Clean:
    return with_copies(clean, evaluator, config, valid=VALID, seed=seed)


def test_there_are_copies_until_there_are_enough_images() -> None:
    clean, evaluator = few(10)
    spent = evaluator.ledger.total
    found = copied(clean, evaluator, CopiesConfig(enough=34))
    assert len(found) == 34
    assert torch.equal(found.images[:10], clean.images)
    assert torch.equal(found.original[:10], clean.original)
    nothing = torch.zeros(1, evaluator.trace.sites, dtype=torch.bool)
    cost = evaluator.ledger.total - spent
    told = evaluator.run(nothing, found.images, exact=True)[0].log_softmax(1)
    assert torch.allclose(found.original, told, atol=1e-5)
    assert 24 <= cost <= CopiesConfig().tries * 30
    for image, label, answer in zip(found.images, found.labels, found.answers, strict=True):
        near = (clean.images - image).flatten(1).norm(dim=1).argmin()
        assert clean.labels[near] == label
        assert clean.answers[near] == answer


def test_with_enough_images_nothing_is_asked() -> None:
    clean, evaluator = few(10)
    spent = evaluator.ledger.total
    found = copied(clean, evaluator, CopiesConfig(enough=10))
    assert torch.equal(found.images, clean.images)
    assert evaluator.ledger.total == spent


def test_copies_that_are_answered_otherwise_are_left_out() -> None:
    clean, evaluator = few(10)
    other = torch.full_like(clean.original, -9.0)
    other[torch.arange(10), (clean.answers + 1) % clean.original.shape[1]] = 0.0
    wrong = replace(clean, original=other)
    spent = evaluator.ledger.total
    found = copied(wrong, evaluator, CopiesConfig(enough=30, tries=3, light=0, shift=0.01))
    assert len(found) == 10, "the network answers copies as it answers the images themselves"
    assert evaluator.ledger.total - spent == 3 * 2 * 10, "three times what is lacking, then no more"


def test_seeds_decide_the_copies() -> None:
    clean, evaluator = few(5)
    one, same, other = (
        copied(clean, evaluator, CopiesConfig(enough=12), seed) for seed in (3, 3, 4)
    )
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images[5:], other.images[5 : len(one)])


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 5), (3, 9, 16)])
def test_images_that_are_not_moved_stay_as_they_are(size: tuple[int, int, int]) -> None:
    images = torch.rand(4, *size, generator=seeded())
    assert torch.allclose(moved(images, STILL, VALID, seeded()), images, atol=1e-5)


@pytest.mark.parametrize("valid", [(0.0, 1.0), (-2.0, 3.0)])
def test_copies_differ_and_stay_real_images(valid: tuple[float, float]) -> None:
    low, high = valid
    images = low + (high - low) * torch.rand(6, 3, 8, 12, generator=seeded())
    copies = moved(images, replace(STILL, light=0.9), valid, seeded())
    assert low <= float(copies.min()) < float(copies.max()) <= high
    assert (copies - images).flatten(1).abs().amax(1).min() > 0.05 * (high - low)


def middle(images: Tensor) -> Tensor:
    """Where the light of images [N, 1, H, W] is, in pixels from the middle: [N, 2]."""
    height, width = images.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )  # fmt: skip
    weight = images.squeeze(1) / images.sum((1, 2, 3))[:, None, None]
    return torch.stack([(weight * y).sum((1, 2)), (weight * x).sum((1, 2))], 1)


def dots(count: int) -> Tensor:
    """A bright spot right of the middle of an image that is wider than high."""
    images = torch.zeros(count, 1, 33, 65)
    images[:, :, 15:18, 41:44] = 1.0  # its middle: 0, 10
    return images


def test_turning_keeps_distances_in_pixels_and_scaling_changes_them() -> None:
    turned = middle(moved(dots(20), replace(STILL, turn=0.7), VALID, seeded()))
    assert torch.allclose(turned.norm(dim=1), torch.full((20,), 10.0), atol=0.3)
    assert turned[:, 0].abs().max() > 3
    scaled = middle(moved(dots(20), replace(STILL, scale=0.4), VALID, seeded())).norm(dim=1)
    assert 10 / 1.41 <= scaled.min() < 9
    assert 11 < scaled.max() <= 10 / 0.59


def test_shifts_are_shares_of_the_sides() -> None:
    shifted = middle(moved(dots(60), replace(STILL, shift=0.2), VALID, seeded()))
    off = (shifted - torch.tensor([0.0, 10.0])).abs()
    assert off[:, 0].max() <= 0.2 * 33 + 0.1
    assert 0.15 * 65 < off[:, 1].max() <= 0.2 * 65 + 0.1


def test_a_search_is_given_copies_where_images_are_few() -> None:
    model, images, labels, _ = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model, ledger=Ledger())
    clean = Clean.seen_by(evaluator, images, labels)
    before = activations(evaluator.network, images[:8])
    config = replace(Config(), copies=CopiesConfig(enough=len(images) + 8))
    scene = Scene(model, evaluator, clean, before, config, VALID, 0)
    assert len(scene.with_copies().clean) == len(images) + 8
    assert evaluator.ledger.forwards["copies"] > 0
    assert len(scene.clean) == len(images), "what else looks at images sees those alone"
    enough = replace(scene, config=replace(config, copies=CopiesConfig(enough=len(images))))
    assert enough.with_copies() is enough
