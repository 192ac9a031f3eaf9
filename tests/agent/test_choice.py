"""Giving back and the final choice, on the toy with a planted backdoor."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onp.agent.choice import choose, halved
from onp.agent.cost import Cost, Parts, dealt_out
from onp.agent.flips import give_back
from onp.clean import Clean
from onp.config import BUDGETS, CostConfig
from onp.evaluate import MaskEvaluator
from onp.probes.probe import LabelShift
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, PLANTED, SIZE, toy


def test_giving_back_keeps_what_matters_and_choosing_takes_the_cheapest() -> None:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    cost = Cost(evaluator, Clean.seen_by(evaluator, images, labels), [probe], CostConfig())
    wide = torch.zeros(CHANNELS, dtype=torch.bool)
    wide[[1, 2, PLANTED, 11, 20]] = True
    slim = give_back(wide, cost, rounds=5)
    assert slim[PLANTED]
    assert int(slim.sum()) < 5
    assert float(cost.worth(slim[None])) >= float(cost.worth(wide[None]))
    only = torch.zeros(CHANNELS, dtype=torch.bool)
    only[PLANTED] = True
    everything = torch.ones(CHANNELS, dtype=torch.bool)
    nothing = torch.zeros(CHANNELS, dtype=torch.bool)
    choice = choose([everything, nothing, only], [cost])
    assert torch.equal(choice.mask, only)
    assert choice.success_after[0] < 0.1 * choice.success_before[0]
    assert choice.interval[0] <= choice.crossfit <= choice.interval[1]


def test_a_mask_under_which_an_answer_is_no_number_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    cost = Cost(evaluator, Clean.seen_by(evaluator, images, labels), [probe], CostConfig())
    masks = torch.eye(CHANNELS, dtype=torch.bool)[[PLANTED, 3]]
    told = Cost.parts

    def parts(cost: Cost, pruned: Tensor) -> Parts:
        found = told(cost, pruned)
        found.harm[pruned[:, 3], 2] = math.nan
        return found

    monkeypatch.setattr(Cost, "parts", parts)
    choice = choose(list(masks), [cost])
    assert torch.equal(choice.mask, masks[0])
    assert math.isfinite(choice.cost)
    assert math.isfinite(choice.crossfit)


def test_a_choice_over_parts_of_the_images_is_one_over_all() -> None:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    probes = [probe, replace(probe, target=0), replace(probe, target=LabelShift(1))]
    seen = Clean.seen_by(evaluator, images, labels)
    masks = torch.eye(CHANNELS, dtype=torch.bool)[[1, PLANTED, 7]]
    ends = [0, 2, 31, len(images)]  # fewer than the probes, an odd number, the rest
    costs = [
        Cost(evaluator, seen[first:last], probes, CostConfig())
        for first, last in itertools.pairwise(ends)
    ]
    choice = choose(list(masks), costs)
    each = torch.cat([cost.each(cost.parts(masks[1:2])) for cost in costs], 1)
    assert torch.equal(choice.mask, masks[1])
    assert choice.cost == pytest.approx(float(each.mean()), abs=1e-6)
    for number in range(len(probes)):
        for found, mask in (
            (choice.success_before, torch.zeros_like(masks[0])),
            (choice.success_after, masks[1]),
        ):
            nats = [
                cost.parts(mask[None]).success[0, place]
                for cost in costs
                for place in cost.hands[number]
                if cost.wanted[place] != cost.labels[place]
            ]
            assert found[number] == pytest.approx(float(sum(nats)) / len(nats), abs=1e-6)
    assert choice.interval[0] < choice.crossfit < choice.interval[1]


def test_halves_share_every_probe_at_every_strength() -> None:
    hands = dealt_out(101, 5)
    first = halved(hands, 101)
    for hand in hands:
        for turn in (0, 1):  # a hand's images are triggered at two strengths in turn
            own = first[hand[turn::2]]
            assert 0.4 < float(own.float().mean()) < 0.65
    assert not halved([torch.tensor([], dtype=torch.int64)], 3).any()


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_searches_on_all_images_or_leaves_some_to_give_back_on(budget: str) -> None:
    """Of the 500 that a user is asked for."""
    config = BUDGETS[budget]
    left = 500 - config.agent.images
    assert left == 0 or left >= config.choice.least
