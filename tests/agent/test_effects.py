"""The model of the margins: gradients against differences, gains against what flips really do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from onp.agent import effects as module
from onp.agent.cost import Cost
from onp.agent.effects import Effects, flip_effects, margin
from onp.agent.policy import State
from onp.config import CostConfig
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, PLANTED, SIZE, toy


@pytest.fixture(scope="module")
def cost() -> Cost:
    """Of the toy: two classes, logits linear in the gates, so that the model is exact there."""
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model, ledger=Ledger())
    return Cost(evaluator, images[:70], labels[:70], [probe], CostConfig())


def foreseen(effects: Effects) -> Tensor:
    """Gains of single flips, float32 [S]; of the mask they depend through ``effects`` alone."""
    return State.of(torch.zeros(len(effects.price), dtype=torch.bool), effects).foreseen


def some_mask() -> Tensor:
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    mask[[3, 11]] = True
    return mask


def test_a_margin_is_a_logit_over_the_others() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    found = margin(logits, torch.tensor([0, 1]))
    expected = torch.stack(
        [2 - torch.tensor([1.0, 0.0]).logsumexp(0), -torch.tensor([0.0, 5.0]).logsumexp(0)]
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sigmoid(), logits.softmax(1)[[0, 1], [0, 1]])


def test_changes_are_those_of_the_margins(cost: Cost) -> None:
    mask = some_mask()
    before = cost.evaluator.ledger.total
    effects = flip_effects(cost, mask)
    assert cost.evaluator.ledger.total - before == 4 * len(cost.images)
    network = cost.evaluator.network
    for site in (0, 3, PLANTED, CHANNELS - 1):
        flip = mask.clone()
        flip[site] ^= True
        for images, answers, now, change in (
            (cost.images, cost.labels, effects.clean, effects.clean_change),
            (cost.triggered, cost.wanted, effects.triggered, effects.triggered_change),
        ):
            found = margin(network(images, (~flip).float()), answers) - now
            torch.testing.assert_close(change[:, site], found, atol=2e-3, rtol=2e-3)


def test_the_gains_are_what_flips_really_bring(cost: Cost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAUTION", 1.0)
    mask = some_mask()
    effects = flip_effects(cost, mask)
    flips = mask.repeat(CHANNELS, 1) ^ torch.eye(CHANNELS, dtype=torch.bool)
    parts = cost.parts(torch.cat([mask[None], flips]))
    harm = parts.harm.mean(1)
    clean, _ = effects.gains(effects.clean_change, effects.triggered_change)
    torch.testing.assert_close(clean, harm[0] - harm[1:], atol=1e-4, rtol=1e-3)
    monkeypatch.undo()  # the planted channel is silent on clean images: nothing to be cautious of
    gain = cost.worth(flips[[PLANTED]]) - cost.worth(mask[None])
    assert float(foreseen(effects)[PLANTED]) == pytest.approx(float(gain), abs=2e-3)
    assert int(foreseen(effects).argmax()) == PLANTED


def test_caution_makes_harm_larger(cost: Cost, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = flip_effects(cost, some_mask())
    cautious = foreseen(effects)
    monkeypatch.setattr(module, "CAUTION", 1.0)
    careless = foreseen(effects)
    harmful = careless < -0.01
    assert bool(harmful.any())
    assert bool((cautious[harmful] < careless[harmful]).all())


def test_a_set_grows_by_what_adds_to_it(cost: Cost) -> None:
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    effects = flip_effects(cost, mask)
    pool = torch.arange(CHANNELS)
    grown = effects.grown(pool, 5)
    assert grown[0] == PLANTED
    assert len(set(grown)) == len(grown) <= 5
    assert effects.grown(pool[pool != PLANTED], 0) == []
    assert effects.grown(torch.empty(0, dtype=torch.int64), 3) == []
    found = []
    for size in range(1, len(grown) + 1):
        sites = grown[:size]
        changes = (
            change[:, sites].sum(1, keepdim=True)
            for change in (effects.clean_change, effects.triggered_change)
        )
        clean, hit = effects.gains(*changes)
        found.append(float(clean + hit + effects.price[sites].sum()))
    assert found == sorted(found)


def test_a_twin_of_what_is_flipped_adds_nothing() -> None:
    """Two sites that each undo the trigger alone: one of them is enough, whatever each promises."""
    images = 4
    cost = cast("Cost", SimpleNamespace(of_success=lambda success: -torch.log1p(-0.98 * success)))
    change = torch.zeros(images, 3)
    change[:, :2] = -20.0
    effects = Effects(
        clean=torch.full((images,), 8.0), clean_change=torch.zeros(images, 3),
        triggered=torch.full((images,), 8.0), triggered_change=change,
        sure=torch.ones(images), own=torch.zeros(images),
        turned=torch.ones(images, dtype=torch.bool), price=torch.full((3,), -0.001), cost=cost,
    )  # fmt: skip
    singles = foreseen(effects)
    assert float(singles[0]) == float(singles[1]) > 3
    assert effects.grown(torch.arange(3), 3) == [0]
