"""Races and counted probes, on the toy with a planted backdoor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from onp.config import BUDGETS, RaceConfig, ScoreConfig, SynthesisConfig
from onp.evaluate import MaskEvaluator
from onp.probes.additive import Additive
from onp.probes.contenders import (
    advantage,
    counted_contenders,
    getting_through,
    leading,
    successes_of,
)
from onp.probes.probe import LabelShift, Probe
from onp.probes.race import Contender, race, ranking_masks
from onp.probes.square import Square
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, PLANTED, SIZE, toy

SIZES = (1 / CHANNELS, 3 / CHANNELS)


def contender(target: int, success: float, size: float, score: float) -> Contender:
    probe = Probe(Additive(), target, [torch.zeros(1, 1, 3, 4, 4)], (0.0, 1.0), size)
    return Contender(probe, torch.zeros(8), success, torch.ones(8).bool(), score, score)


def test_ranking_masks_are_nested_heads() -> None:
    masks = ranking_masks(torch.tensor([0.1, 0.9, 0.5, 0.7]), (0.25, 0.5, 0.01))
    assert masks.tolist() == [
        [False, True, False, False],
        [False, True, False, True],
        [False, True, False, False],
    ]


def test_the_race_finds_the_planted_channel_and_skips_weak_probes() -> None:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    idle = Probe(Additive(), 1, [torch.zeros(1, 1, 3, SIZE, SIZE)], (0.0, 1.0), 1.0)
    ranking = torch.arange(CHANNELS).float()
    ranking[PLANTED] = 100.0
    config = RaceConfig(sizes=SIZES, first_images=32, second_images=48)
    found = race(
        evaluator, images, labels, [idle, probe], [ranking, ranking], config, ScoreConfig()
    )
    assert [c.probe for c in found] == [probe, idle]
    assert found[0].mask[PLANTED]
    assert found[0].removed > 0.8
    assert (found[1].score, found[1].size) == (0.0, 0)
    assert race(evaluator, images, labels, [], [], config, ScoreConfig()) == []

    config = BUDGETS["standard"]
    mask = found[0].mask
    assert getting_through([probe], evaluator, ~mask & mask, images, labels, found, config) == [
        probe
    ]
    assert getting_through([probe], evaluator, mask, images, labels, found, config) == []


def test_a_probe_without_images_to_turn_has_no_success() -> None:
    model, images, _, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    nothing = torch.zeros(CHANNELS, dtype=torch.bool)
    own = probe.wanted(torch.zeros(len(images), dtype=torch.int64))
    assert successes_of([probe], evaluator, nothing, images, own) == [0.0]


def test_several_probes_are_judged_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onp.probes.contenders.TOGETHER", 2)
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    mask[1] = True
    other = replace(probe, target=0)
    probes = [probe, other, replace(probe, target=LabelShift(2)), other, probe]
    before = evaluator.ledger.total
    found = successes_of(probes, evaluator, mask, images, labels)
    turned = sum(int((one.wanted(labels) != labels).sum()) for one in probes)
    assert evaluator.ledger.total - before == len(images) + turned
    clean = evaluator.run(mask[None], images)[0].softmax(1)
    for one, success in zip(probes, found, strict=True):
        wanted = one.wanted(labels)
        hit = evaluator.run(mask[None], one(images))[0].softmax(1)
        excess = (hit - clean).gather(1, wanted[:, None]).squeeze(1)[wanted != labels]
        assert success == pytest.approx(float(excess.clamp_min(0).mean()), abs=1e-5)
    assert len({round(success, 4) for success in found}) > 1
    assert successes_of([], evaluator, mask, images, labels) == []


def test_advantage_compares_within_the_family_across_classes() -> None:
    strong, weak, other = contender(3, 1.0, 0.5, 0.9), contender(3, 0.7, 1.0, 0.8), contender(
        5, 0.5, 1.0, 0.7
    )  # fmt: skip
    assert advantage(strong, [strong, other]) == 2.0
    assert advantage(strong, [strong, weak]) == 0.0  # no other class was probed
    rows = [strong, weak, other]
    wide, narrow = SynthesisConfig(counted_margin=0.15), SynthesisConfig(counted_margin=0.05)
    for caller in (strong, contender(3, 1.0, 0.5, 0.9)):  # among them or not
        assert counted_contenders(rows, caller.probe, wide) == [strong, weak]
        assert counted_contenders(rows, caller.probe, narrow) == [strong]
        assert counted_contenders(rows, caller.probe, SynthesisConfig(counted=1)) == [strong]


def test_the_probe_that_called_is_never_left_out() -> None:
    """Whatever its mask is worth, and though no other class had one of its family."""
    best, rival = contender(3, 1.0, 0.5, 0.9), contender(5, 0.5, 1.0, 0.7)
    caller = replace(best, probe=replace(best.probe, family=Square(0, 0)), score=-0.1)
    rows = [best, caller, rival]
    assert leading(rows, 0.5) is best
    assert counted_contenders(rows, caller.probe, SynthesisConfig()) == [caller, best]
    assert counted_contenders(rows, caller.probe, SynthesisConfig(counted=1)) == [caller]
    weaker = contender(3, 0.9, 0.5, 0.85)
    rows = [best, weaker, rival]
    assert counted_contenders(rows, weaker.probe, SynthesisConfig()) == [best, weaker]
    assert counted_contenders(rows, weaker.probe, SynthesisConfig(counted=1)) == [weaker]
    assert leading([best, rival], 1.1) is None


def test_a_probe_that_leads_by_far_counts_whatever_its_mask_is_worth() -> None:
    best = contender(3, 1.0, 0.5, 0.9)
    rival = contender(5, 0.5, 1.0, 0.7)  # half as strong as a probe of 1.0 and 1.0
    far, barely = contender(3, 1.0, 0.9, 0.0), contender(3, 0.7, 1.0, 0.0)
    seldom = contender(3, 0.4, 0.3, 0.0)  # leads by 2^1.4
    assert advantage(far, [far, rival]) > 0.6 > advantage(barely, [barely, rival]) > 0
    assert advantage(seldom, [seldom, rival]) > 1
    rows = [far, barely, seldom, rival, best]
    called, seldom_too = best.probe, SynthesisConfig(counted_success=0.3)
    assert counted_contenders(rows, called, SynthesisConfig()) == [best, far]
    assert counted_contenders(rows, called, seldom_too) == [best, seldom, far]
    assert counted_contenders(rows, called, SynthesisConfig(counted=1)) == [best]
    near = SynthesisConfig(counted_margin=1.0)  # all are nearly as repairable
    assert counted_contenders(rows, called, near) == [best, far, barely]


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_size_that_is_no_number_neither_leads_nor_hides_a_lead(place: int) -> None:
    """Wherever it stands among the contenders."""
    sizes = [1.0, 1.0, 1.0, 1.0]
    sizes[place] = math.nan
    found = [contender(target, 0.9, size, 0.5) for target, size in enumerate(sizes)]
    found[1] = contender(1, 0.9, 0.25, 0.5)
    best = leading(found, 0.5)
    assert best is found[1]
    assert advantage(best, found) == pytest.approx(2.0)
    assert all(math.isfinite(advantage(one, found)) for one in found)


def test_an_answer_that_is_no_number_reaches_nothing() -> None:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    open_ = torch.zeros(CHANNELS, dtype=torch.bool)
    lost = replace(probe, parameters=[torch.full_like(one, math.nan) for one in probe.parameters])
    expected = successes_of([probe], evaluator, open_, images, labels)[0]
    reached = successes_of([lost, probe], evaluator, open_, images, labels)
    assert reached == [0.0, pytest.approx(expected)]
    assert expected > 0.3
