"""Probes need an advantage over other classes; norm statistics an excess and one class."""

from __future__ import annotations

import math

import pytest
import torch

from onp.agent.contenders import advantage
from onp.agent.race import Contender
from onp.config import VerdictConfig
from onp.probes.additive import Additive
from onp.probes.patch import Patch
from onp.probes.probe import LabelShift, Probe, Target
from onp.probes.replay import Replayed
from onp.verdict import (
    Verdict,
    by_label_shift,
    by_statistics,
    judge,
    may_be_called,
    second,
    target_of,
)

CONFIG = VerdictConfig()


def test_a_backdoor_shows_in_all_three() -> None:
    verdict = judge(4, 2.0, 0.98, 0.95, 0.0, CONFIG)
    assert (verdict.finding, verdict.target, verdict.score) == ("backdoor", 4, 1.0)
    assert "2^2.0" in verdict.reason


@pytest.mark.parametrize("advantage", [-3.0, 0.0, 0.4])
def test_without_advantage_nothing_else_counts(advantage: float) -> None:
    verdict = judge(4, advantage, 1.0, 1.0, 0.0, CONFIG)
    assert (verdict.finding, verdict.target, verdict.score) == ("clean", None, 0.0)


@pytest.mark.parametrize("size", [1.0, 1.3, 1.45, 1.6, 2.0, 4.0])
def test_what_may_not_be_called_is_called_by_no_race(size: float) -> None:
    """One of two classes' probes is ``size`` times as strong."""
    nothing = torch.zeros(5, dtype=torch.bool)
    contenders = [
        Contender(Probe(Additive(), target, [], (0.0, 1.0), one), torch.zeros(5), 1.0, nothing)
        for target, one in ((1, 1.0), (2, size))
    ]
    lead = max(advantage(one, contenders) for one in contenders)
    assert lead == pytest.approx(math.log2(size))
    best = judge(1, lead, 1.0, 1.0, 0.0, CONFIG)  # with the most that unlearning and a race may say
    assert may_be_called(contenders, CONFIG) == (best.finding == "backdoor")
    assert not may_be_called([], CONFIG)
    unraced = judge(1, 9.0, 1.0, None, 0.0, CONFIG)
    assert (unraced.score, "was not looked for" in unraced.reason) == (0.0, True)


def test_the_score_grows_with_each_piece() -> None:
    base = judge(0, 0.9, 0.5, 0.6, 0.0, CONFIG).score
    assert judge(0, 1.0, 0.5, 0.6, 0.0, CONFIG).score > base
    assert judge(0, 0.9, 0.6, 0.6, 0.0, CONFIG).score > base
    assert judge(0, 0.9, 0.5, 0.7, 0.0, CONFIG).score > base


def test_where_unlearning_says_nothing_the_others_support_alone() -> None:
    verdict = judge(2, 2.0, None, 0.9, 0.0, CONFIG)
    assert (verdict.score, "concentration" in verdict.evidence) == (1.0, False)
    assert "says nothing without batch norms" in verdict.reason
    assert judge(2, 2.0, None, 0.5, 0.0, CONFIG).score == 0.5  # no class is left, none supports
    assert judge(2, 2.0, 0.0, 0.9, 0.0, CONFIG).score == 0.75


def test_a_second_family_stands_in_for_a_repair_that_a_race_does_not_find() -> None:
    assert judge(2, 2.0, None, 0.3, 1.4, CONFIG).score == 1.0
    assert judge(2, 2.0, None, 0.3, 0.4, CONFIG).score == 0.5
    assert judge(2, 0.4, None, 0.3, 2.0, CONFIG).score == 0.0  # none of them counts without a lead
    nothing = torch.zeros(5, dtype=torch.bool)
    rows = [
        Contender(Probe(family, target, [], (0.0, 1.0), size), torch.zeros(5), 1.0, nothing)
        for family, target, size in (
            (Additive(), 1, 0.25), (Additive(), 2, 1.0), (Patch(), 1, 0.5), (Patch(), 2, 1.0),
        )
    ]  # fmt: skip
    least = CONFIG.least_success
    assert [second(one, rows, [], least) for one in rows] == [1.0, -1.0, 2.0, -2.0]
    assert second(rows[0], rows[:2], [], least) == 0.0
    assert second(rows[0], rows[:2], rows[2:], least) == 1.0  # a first look with another family
    assert second(rows[2], rows[2:], rows[2:], least) == 1.0  # with its own


def test_a_family_that_hardly_works_seconds_nothing() -> None:
    nothing = torch.zeros(5, dtype=torch.bool)
    rows = [
        Contender(Probe(family, target, [], (0.0, 1.0), 1.0), torch.zeros(5), success, nothing)
        for family, target, success in (
            (Additive(), 1, 0.9), (Additive(), 2, 0.3), (Patch(), 1, 0.03), (Patch(), 2, 0.01),
        )
    ]  # fmt: skip
    assert advantage(rows[2], rows) > 1.4
    assert second(rows[0], rows, [], CONFIG.least_success) == 0.0
    assert second(rows[0], rows[:2], rows[2:], CONFIG.least_success) == 0.0
    assert second(rows[0], rows, [], 0.0) == advantage(rows[2], rows)


def test_a_probe_that_cannot_be_pruned_away_is_no_evidence() -> None:
    assert judge(0, 2.0, 1.0, 0.0, 0.0, CONFIG).score == 0.0


def replayed(excess: float, share: float) -> Verdict:
    probe = Probe(Additive(), 7, [torch.zeros(1, 1, 3, 4, 4)], (0.0, 1.0), 1.0)
    return by_statistics(excess, [Replayed(probe, share, 0.9)], CONFIG)


def test_norm_statistics_call_a_backdoor_where_both_speak() -> None:
    verdict = replayed(4.0, 0.9)
    assert (verdict.finding, verdict.target, verdict.score) == ("backdoor", 7, 1.0)
    assert verdict.evidence == {"excess": 4.0, "share": 0.9, "agreement": 0.9}
    assert "4.0 times" in verdict.reason


def test_the_threshold_lies_between() -> None:
    assert replayed(1.7, 0.43).finding == "clean"
    assert replayed(1.7, 0.45).finding == "backdoor"


@pytest.mark.parametrize(("excess", "share"), [(4.0, 0.23), (1.25, 0.9), (1.7, 0.4)])
def test_one_alone_is_not_enough(excess: float, share: float) -> None:
    verdict = replayed(excess, share)
    assert (verdict.finding, verdict.target) == ("clean", None)


def answered(target: Target, share: float) -> Replayed:
    return Replayed(
        Probe(Additive(), target, [torch.zeros(1, 1, 3, 4, 4)], (0.0, 1.0), 1.0), share, 0.9
    )


def test_triggers_speak_with_the_share_of_images_that_they_move() -> None:
    assert target_of([answered(2, 0.5), answered(7, 0.3), answered(7, 0.4)]) == 7
    assert target_of([answered(2, 0.8), answered(7, 0.3), answered(7, 0.4)]) == 2


def test_triggers_that_answer_another_class_weaken_the_verdict() -> None:
    alone = by_statistics(1.7, [answered(7, 0.5)], CONFIG)
    split = by_statistics(1.7, [answered(7, 0.5), answered(2, 0.4)], CONFIG)
    assert alone.finding == "backdoor"
    assert split.finding == "clean"
    assert split.evidence["share"] == 0.25


@pytest.mark.parametrize(
    ("excess", "one", "two", "finding"),
    [(1.9, 0.5, 0.05, "backdoor"), (1.9, 0.13, 0.15, "clean"), (1.3, 0.2, 0.02, "clean")],
)
def test_labels_shifted_by_one_are_judged_against_those_by_two(
    excess: float, one: float, two: float, finding: str
) -> None:
    shifts = [answered(LabelShift(10, by), share) for by, share in ((1, one), (2, two))]
    verdict = by_label_shift(excess, shifts[0], shifts[1], CONFIG)
    assert verdict.finding == finding
    assert verdict.target == (LabelShift(10, 1) if finding == "backdoor" else None)
