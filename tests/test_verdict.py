"""Probes need a lead over other classes; norm statistics an excess and one class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from onp.config import VerdictConfig
from onp.probes.additive import Additive
from onp.probes.contenders import advantage
from onp.probes.families import Family
from onp.probes.margin import Margins
from onp.probes.patch import Patch
from onp.probes.probe import LabelShift, Probe, Target
from onp.probes.race import Contender
from onp.probes.replay import Replayed
from onp.verdict import (
    Ground,
    Verdict,
    also_answered,
    also_called,
    beyond_doubt,
    by_label_shift,
    by_looks,
    by_margins,
    by_shifting_squares,
    by_squares,
    by_statistics,
    target_of,
)

CONFIG = VerdictConfig()
LEAST = CONFIG.threshold * CONFIG.lead
"""Lead from which on a backdoor is called."""
ADDITIVE, PATCH = Additive(), Patch()


def probed(*probes: tuple[Family, int, float, float]) -> list[Contender]:
    """(family, target, size, success) each."""
    nothing = torch.zeros(5, dtype=torch.bool)
    return [
        Contender(Probe(family, target, [], (0.0, 1.0), size), torch.zeros(5), success, nothing)
        for family, target, size, success in probes
    ]


def led_by(lead: float, classes: int) -> list[Contender]:
    """The last class leads all others by so much (binary logarithm)."""
    sizes = [1.0] * (classes - 1) + [2**-lead]
    return probed(*((ADDITIVE, k, size, 1.0) for k, size in enumerate(sizes)))


@pytest.mark.parametrize("lead", [-1.0, 0.0, 0.3, 0.6, 0.65, 0.9, 2.0])
def test_the_score_is_the_lead(lead: float) -> None:
    contenders = led_by(lead, 10)
    assert advantage(contenders[-1], contenders) == pytest.approx(lead)
    verdict = by_looks(contenders, CONFIG)
    assert verdict.score == pytest.approx(min(max(lead / CONFIG.lead, 0.0), 1.0))
    assert (verdict.finding == "backdoor") == (lead > LEAST)
    assert verdict.target == (9 if lead > LEAST else None)
    assert verdict.evidence["success"] == 1.0


def test_the_best_family_speaks() -> None:
    contenders = probed(
        *((ADDITIVE, k, 1.0, 0.9) for k in range(10)),
        *((PATCH, k, 0.5 if k == 2 else 1.0, 0.9) for k in range(10)),
    )
    verdict = by_looks(contenders, CONFIG)
    assert (verdict.target, verdict.evidence["advantage"]) == (2, 1.0)
    assert "patch, for class 2) are 2^1.0 times" in verdict.reason


def test_a_probe_that_hardly_works_leads_by_chance() -> None:
    contenders = probed(
        (ADDITIVE, 1, 1.0, 0.9),
        (ADDITIVE, 2, 1.0, 0.8),
        (PATCH, 3, 1.0, 0.1),
        (PATCH, 1, 1.0, 0.01),
    )
    assert advantage(contenders[2], contenders) > 3
    assert by_looks(contenders, CONFIG).finding == "clean"
    none = by_looks(contenders[2:], CONFIG)
    assert (none.finding, none.score) == ("clean", 0.0)
    assert "no probe works" in none.reason


@pytest.mark.parametrize(("among", "times"), [(5, 4.0), (9, 1.6), (10, 1.0), (40, 1.0)])
def test_a_lead_over_few_classes_counts_less(among: int, times: float) -> None:
    least = times * LEAST
    for lead, finding in ((least - 0.01, "clean"), (least + 0.01, "backdoor")):
        assert by_looks(led_by(lead, among), CONFIG).finding == finding


def test_of_a_few_classes_no_probe_leads() -> None:
    contenders = led_by(4.3, 5)
    assert by_looks(contenders, CONFIG).finding == "backdoor"
    verdict = by_looks(contenders[1:], CONFIG)
    assert (verdict.finding, verdict.score) == ("clean", 0.0)
    assert "of 4 classes" in verdict.reason


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_where_norms_have_called_only_the_class_is_asked_for(classes: int) -> None:
    for lead in (LEAST - 0.01, LEAST + 0.01):
        verdict = by_looks(led_by(lead, classes), CONFIG, called=True)
        named = lead > LEAST and classes > 2
        assert verdict.target == (classes - 1 if named else None)


TARGETS = range(18, -1, -2)


def squares(best: float, rival: float, elsewhere: float = 0.0) -> torch.Tensor:
    """Successes [places, classes] where class 3 of 10 works in the last of three places."""
    successes = torch.full((3, 10), 0.01)
    successes[2, 3], successes[2, 1], successes[0, 1] = best, rival, elsewhere
    return successes


@pytest.mark.parametrize(
    ("best", "rival", "elsewhere", "lead"),
    [
        (0.9, 0.1, 0.0, 3.17),
        (0.9, 0.1, 0.9, 3.17),  # the lead is over what works in the same place
        (0.9, 0.01, 0.0, 4.17),  # less than the floor counts as that
        (0.9, 0.3, 0.0, 1.58),
        (0.55, 0.5, 0.0, 0.14),
    ],
)
def test_a_square_must_lead_in_its_place(
    best: float, rival: float, elsewhere: float, lead: float
) -> None:
    successes = squares(best, rival, elsewhere)
    successes[0, 0] = elsewhere  # two classes there
    verdict, place = by_squares(successes, TARGETS, CONFIG)
    low, high = CONFIG.square_lead
    called = lead > low + CONFIG.threshold * (high - low)
    assert (verdict.finding == "backdoor") == called
    assert verdict.target == (12 if called else None)
    assert (verdict.by, place) == ("squares", 2)
    score = min(max((lead - low) / (high - low), 0.0), 1.0)
    assert verdict.score == pytest.approx(score, abs=0.005)
    assert verdict.evidence["success"] == pytest.approx(best)
    assert verdict.evidence["place"] == 2
    assert "in place 2 works" in verdict.reason


def test_a_square_that_works_on_few_images_leads_by_chance() -> None:
    verdict, place = by_squares(squares(0.45, 0.01), TARGETS, CONFIG)
    assert (verdict.finding, verdict.score, verdict.target) == ("clean", 0.0, None)
    assert (place, verdict.evidence["success"]) == (2, pytest.approx(0.45))
    assert "no square works on 50%" in verdict.reason


@pytest.mark.parametrize(("among", "least"), [(5, 0.8), (8, 0.62), (10, 0.5), (43, 0.5)])
def test_a_square_among_few_classes_must_work_on_more(among: int, least: float) -> None:
    for success in (least - 0.01, least + 0.01):
        few = torch.full((2, among), 0.01)
        few[1, 2] = success
        verdict, _ = by_squares(few, range(among), CONFIG)
        assert verdict.target == (2 if success > least else None)
        assert ("no square works" in verdict.reason) == (success < least)


def test_a_square_among_few_classes_must_lead_by_more() -> None:
    few = torch.tensor([[0.9, 0.12, 0.01, 0.01], [0.1, 0.1, 0.1, 0.1]])
    assert by_squares(few, [0, 1, 2, 3], CONFIG)[0].finding == "clean"
    assert by_squares(torch.nn.functional.pad(few, (0, 1)), range(5), CONFIG)[0].target == 0
    assert by_squares(few[:, :1], [7], CONFIG)[0].finding == "clean"  # over nothing


def margins(driven: list[float], natural: list[float] | None = None) -> Margins:
    """Of the classes 9, 8, ..."""
    likely = torch.tensor(natural) if natural else torch.ones(len(driven))
    return Margins([9 - place for place in range(len(driven))], torch.tensor(driven), likely)


@pytest.mark.parametrize(
    ("driven", "natural", "lead"),
    [
        ([4.0, 1.0, 8.0, 2.0, 1.0], None, 1.0),
        ([4.0, 1.0, 5.0, 2.0, 1.0], None, 0.32),
        ([4.0, 1.0, 8.0, 2.0, 1.0], [1.0, 1.0, 1.5, 1.0, 1.0], 0.415),  # less far by nature
        ([4.0, 1.0, 8.0, 2.0, 1.0], [4.0, 1.0, 1.0, 1.0, 1.0], 1.0),  # further: the logits count
        ([4.0, 1.0, 8.0, 2.0, 1.0], [1.0, 1.0, 4.0, 1.0, 1.0], 0.0),  # another class is first so
        ([4.0, 1.0, 8.0, 2.0, 1.0], [1.0, 1.0, float("inf"), 1.0, 1.0], 0.0),  # no image of it
        ([4.0, 1.0, 8.0, 2.0, 1.0], [torch.inf, torch.inf, 1.0, torch.inf, 1.0], 0.0),  # of two
        ([-3.0, -2.0, -1.0, -2.0, -5.0], None, 0.0),  # nothing reaches any of them
    ],
)
def test_margins_lead_in_logits_and_over_what_is_natural(
    driven: list[float], natural: list[float] | None, lead: float
) -> None:
    verdict = by_margins(margins(driven, natural), CONFIG)
    low, high = (1.85 * bound for bound in CONFIG.margin_lead)  # of five classes
    called = lead > low + CONFIG.threshold * (high - low)
    assert (verdict.by, verdict.finding) == ("margins", "backdoor" if called else "clean")
    assert verdict.target == (7 if called else None)
    assert verdict.evidence["advantage"] == pytest.approx(lead, abs=0.005)
    assert ("surer of class 7 than of any other" in verdict.reason) == (lead > 0)


@pytest.mark.parametrize(
    ("among", "least"), [(3, 1.1005), (5, 0.9296), (9, 0.588), (10, 0.5025), (43, 0.5025)]
)
def test_margins_of_few_classes_must_lead_by_more(among: int, least: float) -> None:
    for lead, finding in ((least - 0.01, "clean"), (least + 0.01, "backdoor")):
        found = by_margins(margins([1.0, 2.0**lead] + [0.5] * (among - 2)), CONFIG)
        assert (found.finding, found.target) == (finding, 8 if finding == "backdoor" else None)


def test_classes_without_images_make_classes_few() -> None:
    known = [1.0, 1.0, torch.inf, 1.0, torch.inf]
    for lead, finding in ((1.1, "clean"), (1.2, "backdoor")):  # as of three classes
        found = by_margins(margins([1.0, 2.0**lead, 0.5, 0.5, 0.5], known), CONFIG)
        assert (found.finding, found.target) == (finding, 8 if finding == "backdoor" else None)


def test_of_two_classes_no_margin_leads() -> None:
    for driven in ([100.0, 1.0], [100.0]):
        verdict = by_margins(margins(driven), CONFIG)
        assert (verdict.finding, verdict.score) == ("clean", 0.0)


def answered(
    target: Target,
    share: float,
    agreement: float = 0.9,
    family: Family = ADDITIVE,
    size: float = 1.0,
    gains: dict[int, float] | None = None,
) -> Replayed:
    """A replayed trigger; gains: of the classes, where not its target's alone."""
    state = [torch.zeros(1, 1, 3, 4, 4)]
    known = torch.zeros(10)
    for one, gain in ({7: share} if gains is None else gains).items():
        known[one] = gain
    return Replayed(Probe(family, target, state, (0.0, 1.0), size), share, agreement, known, 0.1)


def replayed(excess: float, share: float) -> Verdict:
    return by_statistics(excess, 500, [answered(7, share)], CONFIG)


def test_norm_statistics_call_a_backdoor_where_both_speak() -> None:
    verdict = replayed(4.0, 0.9)
    assert (verdict.finding, verdict.target, verdict.score) == ("backdoor", 7, 1.0)
    assert verdict.evidence == {"excess": 4.0, "share": 0.9, "agreement": 0.9, "effort": 0.0}
    assert "4.0 times" in verdict.reason


def test_the_threshold_lies_between() -> None:
    assert replayed(1.7, 0.43).finding == "clean"
    assert replayed(1.7, 0.45).finding == "backdoor"


@pytest.mark.parametrize(("excess", "share"), [(4.0, 0.23), (1.25, 0.9), (1.7, 0.4)])
def test_one_alone_is_not_enough(excess: float, share: float) -> None:
    verdict = replayed(excess, share)
    assert (verdict.finding, verdict.target) == ("clean", None)


@pytest.mark.parametrize(
    ("size", "excess", "agreement", "called"),
    [
        (4.0, 5.0, 0.9, True),  # large, but so is what it explains
        (2.0, 2.0, 0.9, True),
        (4.0, 2.0, 0.9, False),  # noise takes a large patch
        (2.0, 2.0, 0.45, False),  # for half of the shift, that is large
        (1.0, 1.4, 0.9, True),
    ],
)
def test_a_shift_that_takes_a_large_patch_is_noise(
    size: float, excess: float, agreement: float, called: bool
) -> None:
    patch = answered(7, 0.9, agreement, PATCH, size)
    verdict = by_statistics(excess, 500, [patch, answered(7, 0.9)], CONFIG)
    assert (verdict.finding == "backdoor") == called
    effort = size / agreement / excess
    assert verdict.evidence["effort"] == pytest.approx(effort)
    few = by_statistics(excess, 125, [patch, answered(7, 0.9)], CONFIG)  # twice the chance
    assert few.evidence["effort"] == pytest.approx(effort / 2)
    other = answered(7, 0.9, size=size)  # whose sizes say nothing
    assert by_statistics(excess, 500, [other], CONFIG).finding == "backdoor"


def test_triggers_speak_with_the_share_of_images_that_they_move() -> None:
    assert target_of([answered(2, 0.5), answered(7, 0.3), answered(7, 0.4)]) == 7
    assert target_of([answered(2, 0.8), answered(7, 0.3), answered(7, 0.4)]) == 2


@pytest.mark.parametrize(
    ("gains", "also"),
    [
        ([{7: 0.5, 2: 0.4}, {7: 0.6, 2: 0.3}], (2,)),
        ([{7: 0.4, 2: 0.2, 5: 0.3}, {7: 0.4, 2: 0.2, 5: 0.3}], (5, 2)),  # the most first
        ([{7: 0.3, 2: 0.2, 5: 0.25, 1: 0.15}] * 2, (5, 2)),  # two at most
        ([{7: 0.9, 2: 0.05}, {7: 0.9, 2: 0.1}], ()),  # a natural direction on the way
        ([{7: 0.2, 2: 0.15}, {7: 0.2, 2: 0.15}], ()),  # they go everywhere
    ],
)
def test_images_that_come_to_further_classes_tell_of_further_triggers(
    gains: list[dict[int, float]], also: tuple[int, ...]
) -> None:
    agreeing = [answered(7, one[7], gains=one) for one in gains]
    astray = answered(3, 0.3, 0.5, gains={3: 0.3, 1: 0.6})  # it does not explain the shift
    for replays in (agreeing, [*agreeing, astray]):
        assert also_answered(replays, 7, CONFIG) == also
    verdict = by_statistics(4.0, 500, agreeing, CONFIG)
    if also:
        together = [sum(one[target] for target in (7, *also)) for one in gains]
        assert verdict.evidence["share"] == pytest.approx(sum(together) / len(together))
    assert verdict.also == (also if verdict.finding == "backdoor" else ())
    assert verdict.targets == ([7, *also] if verdict.finding == "backdoor" else [])
    assert also_answered([astray], 3, CONFIG) == ()
    lacking = tuple(one for one in also if one != 2)
    assert also_answered(agreeing, 7, CONFIG, [0, 1, 5, 7]) == lacking
    few = [replace(one, gains=one.gains[[0, 1, 2, 3, 4, 5, 6, 7, 8]]) for one in agreeing]
    assert also_answered(few, 7, CONFIG) == ()  # among fewer than ten classes much else looks so


def test_triggers_that_answer_another_class_weaken_the_verdict() -> None:
    alone = by_statistics(1.7, 500, [answered(7, 0.5)], CONFIG)
    split = by_statistics(1.7, 500, [answered(7, 0.5), answered(2, 0.4)], CONFIG)
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


@pytest.mark.parametrize(
    ("success", "control", "present", "called"),
    [
        (0.72, 0.01, 10, True),
        (0.37, 0.10, 10, True),  # of an attack that works on 60% of the images
        (0.11, 0.01, 10, False),  # the most of a network without such a backdoor
        (0.50, 0.35, 10, False),  # which shifts labels by two as well
        (0.34, 0.01, 3, False),  # leads to one of three classes
        (0.80, 0.10, 3, True),
    ],
)
def test_squares_that_shift_labels(
    success: float, control: float, present: int, called: bool
) -> None:
    successes = torch.tensor([[0.02, 0.9], [success, control], [0.03, 0.01]])
    shift = LabelShift(present, 1)
    verdict, place = by_shifting_squares(successes, shift, present, CONFIG)
    assert (verdict.target, place) == (shift if called else None, 1)
    assert (verdict.by, verdict.finding == "backdoor") == ("squares", called)
    assert verdict.evidence["success"] == pytest.approx(success)
    assert "into the next class" in verdict.reason


def test_a_place_where_labels_move_by_two_as_well_hides_no_other() -> None:
    successes = torch.tensor([[0.5, 0.45], [0.45, 0.02]])
    verdict, place = by_shifting_squares(successes, LabelShift(10, 1), 10, CONFIG)
    assert (verdict.finding, place) == ("backdoor", 1)


@pytest.mark.parametrize(
    ("by", "advantage", "success", "sure"),
    [
        ("squares", 3.5, 0.93, True),
        ("squares", 2.5, 0.93, False),
        ("squares", 3.5, 0.7, False),
        ("looks", 1.9, 0.93, True),
        ("looks", 2.4, 0.51, False),
        ("looks", 1.1, 0.93, False),
    ],
)
def test_what_is_called_beside_another_class_must_be_beyond_doubt(
    by: Ground, advantage: float, success: float, sure: bool
) -> None:
    evidence = {"advantage": advantage, "success": success}
    verdict = Verdict("backdoor", 0.9, 3, by, evidence, "score 0.90: why")
    assert beyond_doubt(verdict, CONFIG) == sure
    assert not beyond_doubt(replace(verdict, finding="clean", target=None), CONFIG)
    assert not beyond_doubt(replace(verdict, by="margins"), CONFIG)
    both = also_called(replace(verdict, target=1), [verdict])
    assert (both.targets, both.reason) == ([1, 3], "score 0.90: why; why")
    same = replace(verdict, also=(2,), reason="score 0.90: and this")
    assert also_called(verdict, [same]).reason == "score 0.90: why; and this"
    assert also_called(verdict, []) == verdict
