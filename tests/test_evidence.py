"""Which evidence decides, and what probes must show before they are believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from onp.clean import Clean
from onp.config import BUDGETS, Config
from onp.evaluate import MaskEvaluator
from onp.evidence import Evidence, gather
from onp.evidence.departures import from_departures
from onp.evidence.looks import from_probes, from_squares, nearest, squares_for
from onp.evidence.norms import from_statistics
from onp.evidence.order import together
from onp.evidence.shifting import from_shifting_squares
from onp.evidence.standing import learned_in
from onp.ledger import Ledger
from onp.probes.additive import Additive
from onp.probes.contenders import advantage
from onp.probes.departure import Departures
from onp.probes.families import Family
from onp.probes.generator import Generator
from onp.probes.margin import Margins
from onp.probes.norm_shift import NormShift
from onp.probes.patch import Patch
from onp.probes.probe import LabelShift, OneClass, Probe, Target
from onp.probes.race import Contender
from onp.probes.replay import Replayed
from onp.probes.responses import activations
from onp.probes.square import SQUARES, Square
from onp.probes.synthesis import FAMILIES
from onp.probes.unlearning import Unlearned
from onp.scene import LOOK, Scene, Squares
from onp.suspect.trace import trace
from onp.verdict import Verdict, by_squares
from tests.networks import all_to_all, dim_images, led_away

CLASSES = 10
STANDARD = BUDGETS["standard"]


def scene(config: Config, classes: int = CLASSES) -> Scene:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))
    clean = Clean(
        torch.rand(20, 3, 8, 8), torch.arange(20) % classes, torch.full((20, classes), -1.6)
    )
    evaluator = MaskEvaluator(
        trace(model.eval(), (3, 8, 8)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    before = [torch.rand(20, 4, 6, 6)]
    return Scene(model, evaluator, clean, before, config, (0.0, 1.0), seed=0)


def said(score: float, by: str = "looks") -> Evidence:
    finding = "backdoor" if score >= 0.55 else "clean"
    target = 1 if score >= 0.55 else None
    verdict = Verdict(finding, score, target, by, {}, "")  # type: ignore[arg-type]
    return Evidence(verdict, [], [])


@pytest.mark.parametrize(
    ("norms", "shift", "probes", "score", "asked"),
    [
        (0.7, 0.9, 0.9, 0.7, False),  # certain: no probe is asked
        (None, None, 0.3, 0.3, True),
        (0.58, None, 0.56, 0.58, True),
        (0.5, None, 0.6, 0.6, True),
        (0.54, None, 0.1, 0.1, True),  # the norms had not called: what the probes say
        (0.5, 0.8, 0.9, 0.8, False),  # squares call a shift of labels: no probe is asked
        (0.58, 0.56, 0.9, 0.58, False),
    ],
)
def test_the_stronger_evidence_decides(
    norms: float | None,
    shift: float | None,
    probes: float,
    score: float,
    asked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asks: list[Scene] = []
    first = None if norms is None else said(norms, "norm statistics")
    monkeypatch.setattr("onp.evidence.order.from_statistics", lambda *_: first)
    second = None if shift is None else said(shift, "squares")
    monkeypatch.setattr("onp.evidence.order.from_shifting_squares", lambda _: second)
    monkeypatch.setattr(
        "onp.evidence.order.from_probes", lambda one, _: (asks.append(one), said(probes))[1]
    )
    assert gather(scene(BUDGETS["quick"]), None).verdict.score == score
    assert bool(asks) == asked


@pytest.mark.parametrize(
    ("agreement", "named", "by", "counted"),
    [
        (0.9, 1, "norm statistics", ["norms"]),  # they explain the shift: alone
        (0.8, 1, "norm statistics", ["probes", "norms"]),
        (0.8, 2, "norm statistics", ["norms"]),  # probes name another class
        (0.8, 3, "norm statistics", ["probes", "norms"]),  # beyond doubt
        (0.6, 2, "looks", ["probes"]),  # they explain little: probes know the class better
    ],
)
def test_triggers_that_explain_a_part_do_not_stand_alone(
    agreement: float, named: int, by: str, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evidence(score: float, ground: str, target: int, name: str) -> Evidence:
        found = {"advantage": 2.0, "success": 0.9} if target == 3 else {"agreement": agreement}
        verdict = Verdict("backdoor", score, target, ground, found, "")  # type: ignore[arg-type]
        probe: Any = SimpleNamespace(name=name, target=target)
        one = Contender(probe, torch.zeros(4), 0.9, torch.zeros(4))
        return Evidence(verdict, [one], [one])

    def names(found: Evidence) -> list[str]:
        return [one.probe.name for one in found.counted]  # type: ignore[attr-defined]

    first = evidence(0.7, "norm statistics", 1, "norms")
    monkeypatch.setattr("onp.evidence.order.from_statistics", lambda *_: first)
    monkeypatch.setattr("onp.evidence.order.from_shifting_squares", lambda _: None)
    second = evidence(0.6 if agreement < 0.65 else 0.9, "looks", named, "probes")
    monkeypatch.setattr("onp.evidence.order.from_probes", lambda *_: second)
    found = gather(scene(BUDGETS["standard"]), None)
    assert found.verdict.by == by
    assert names(found) == counted
    assert found.verdict.also == ((3,) if named == 3 else ())
    monkeypatch.setattr("onp.evidence.order.with_others", lambda _, found: found)
    quick = gather(scene(BUDGETS["quick"]), None)
    assert names(quick) == (["norms"] if agreement > 0.7 else counted)


def test_a_class_that_norms_call_counts_though_looks_call_another_first() -> None:
    def one(target: int) -> Contender:
        none = torch.zeros(4)
        return Contender(Probe(Patch(), target, [], (0.0, 1.0), 1.0), none, 0.9, none.bool())

    norms = Verdict("backdoor", 0.7, 1, "norm statistics", {}, "norms")
    first = Evidence(norms, [one(1)], [one(1)], norms)
    doubtful, sure = {"advantage": 1.0, "success": 0.9}, {"advantage": 2.0, "success": 0.9}
    for found, targets in ((doubtful, [1, 4]), (sure, [1, 2, 4])):
        looks = Verdict("backdoor", 1.0, 2, "looks", found, "score 1.00: looks", (1, 4))
        probes = [one(2), one(1), one(4)]
        both = together(first, Evidence(looks, probes, probes), STANDARD)
        assert both.verdict.targets == targets
        assert {each.probe.target for each in both.counted} == set(targets)
        assert len(both.contenders) == 4
        assert both.statistics is norms


@pytest.mark.parametrize(
    ("classes", "agreement", "success", "counted"),
    [
        (5, 0.9, 0.9, ["square", "norms"]),
        (5, 0.7, 0.9, ["square", "norms"]),  # probes would have to call the class themselves
        (5, 0.9, 0.1, ["norms"]),  # it does not work
        (10, 0.9, 0.9, ["norms"]),
    ],
)
def test_among_few_classes_a_square_counts_beside_the_norms_triggers(
    classes: int,
    agreement: float,
    success: float,
    counted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, none = scene(STANDARD, classes), torch.zeros(4)
    play = Play(monkeypatch, at_length=(0.9, success))
    verdict = Verdict("backdoor", 0.7, 3, "norm statistics", {"agreement": agreement}, "")
    replayed = Probe(Generator(), 3, [], (0.0, 1.0), 1.0)
    norms = Contender(replayed, none, 0.9, none.bool())
    first = Evidence(verdict, [norms], [norms], verdict)
    monkeypatch.setattr("onp.evidence.order.from_statistics", lambda *_: first)
    found = gather(here, None)
    assert found.verdict == verdict
    assert bool(found.looked) == (classes == 10)  # whether another class has a trigger, too
    names = {"generator": "norms"}
    families = [one.probe.family.name for one in found.counted]
    assert [names.get(name, name) for name in families] == counted
    assert play.asked == ([] if classes == 10 else ["square 3"])
    assert found.statistics is verdict
    if "square" in counted:
        assert found.counted[0].probe.family is SQUARES[6]  # where squares lead to the class


def test_where_norms_have_called_margins_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def probes(_: Scene, called: bool) -> Evidence:
        asked.append(called)
        return said(0.1)

    monkeypatch.setattr("onp.evidence.order.from_shifting_squares", lambda _: None)
    monkeypatch.setattr("onp.evidence.order.from_probes", probes)
    for norms in (None, 0.3, 0.58):
        first = None if norms is None else said(norms, "norm statistics")
        monkeypatch.setattr("onp.evidence.order.from_statistics", lambda *_, first=first: first)
        gather(scene(BUDGETS["standard"]), None)
    assert asked == [False, False, True]
    play = Play(monkeypatch)
    assert from_probes(scene(STANDARD), called=True).margins is None
    assert play.driven == []


@pytest.mark.parametrize("memory", [19, 199])
def test_norms_that_remember_much_need_more_excess(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = scene(BUDGETS["standard"])
    moments = SimpleNamespace(remembered=128.0 * memory)
    clean = torch.zeros(20, 8)
    shift = NormShift(moments, clean, *[torch.zeros(0)] * 4, 2.15)  # type: ignore[arg-type]
    assert shift.long == (memory > 100)
    probe = Probe(Additive(), 1, [torch.zeros(1, 1, 3, 8, 8)], (0.0, 1.0), 1.0)
    one = Replayed(probe, 0.9, 0.9, torch.eye(CLASSES)[1] * 0.9, 0.1)
    monkeypatch.setattr(Scene, "replayed", lambda *_, **__: [one])
    monkeypatch.setattr(Scene, "unraced", lambda *_: [])
    monkeypatch.setattr("onp.evidence.norms.by_label_shift", lambda *_: said(0.0).verdict)
    found = from_statistics(here, shift)
    assert found is not None
    low, high = here.config.verdict.excess
    counted = 2.15 / (here.config.verdict.moving if memory > 100 else 1.0)
    assert found.verdict.evidence["excess"] == pytest.approx(counted)
    assert found.verdict.score == pytest.approx(((counted - low) / (high - low) + 1) / 2)


@pytest.mark.parametrize(
    ("budget", "share", "agreement", "size", "asked"),
    [
        ("quick", 0.9, 0.9, 1.0, [16]),
        ("quick", 0.9, 0.6, 1.0, [16, 40]),  # explains little
        ("quick", 0.9, 0.9, 4.0, [16, 40]),  # takes much for it
        ("quick", 0.25, 0.9, 1.0, [16, 40]),  # hardly called
        ("quick", 0.1, 0.6, 4.0, [16]),  # not called
        ("standard", 0.9, 0.6, 2.0, [40]),
    ],
)
def test_what_few_steps_call_in_doubt_is_learned_for_longer(
    budget: str,
    share: float,
    agreement: float,
    size: float,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what more steps say counts: here, that they move no image."""
    patch = Probe(Patch(), 1, [torch.zeros(1, 1, 3, 8, 8)], (0.0, 1.0), size)
    found, steps = replayed_in_steps(
        budget,
        lambda steps, target: (
            replace(patch, target=1 if target is None else target),
            share if target is None and steps == asked[0] else 0.0,
            agreement,
        ),
        monkeypatch,
    )
    by_class = [one for one, target in steps if target is None]
    assert list(dict.fromkeys(by_class)) == asked
    assert (found.verdict.target == 1) == (len(asked) == 1 and share > 0.1)


@pytest.mark.parametrize(("share", "asked"), [(0.9, [16]), (0.26, [16, 40])])
def test_a_shift_of_labels_that_is_hardly_called_is_learned_for_longer(
    share: float, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all its triggers are, if it is called then as well."""
    patch = Probe(Patch(), 1, [torch.zeros(1, 1, 3, 8, 8)], (0.0, 1.0), 1.0)
    found, steps = replayed_in_steps(
        "quick",
        lambda _, target: (
            replace(patch, target=1 if target is None else target),
            share if target == LabelShift(CLASSES, 1) else 0.0,
            0.9,
        ),
        monkeypatch,
    )
    assert found.verdict.target == LabelShift(CLASSES, 1)
    shifted = [one for one, target in steps if target == LabelShift(CLASSES, 1)]
    families = len(BUDGETS["quick"].replay.families)
    assert shifted == [*asked, *[asked[-1]] * (families - 1)]


def replayed_in_steps(
    budget: str,
    say: Callable[[int, Target | None], tuple[Probe, float, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Evidence, list[tuple[int, Target | None]]]:
    """What norms of an excess of 2.4 say where a trigger of so many steps for a target, which
    ``say`` gives, moves a share of the images and agrees with the shift so far; and what was
    asked for."""
    here = scene(BUDGETS[budget])
    asked = list[tuple[int, Target | None]]()

    def replayed(
        _: Scene, __: NormShift, ___: str, targets: Sequence[Target] = (), *, steps: int
    ) -> list[Replayed]:
        target = targets[0] if targets else None
        asked.append((steps, target))
        probe, share, agreement = say(steps, target)
        return [Replayed(probe, share, agreement, torch.eye(CLASSES)[1] * share, 0.1)]

    monkeypatch.setattr(Scene, "replayed", replayed)
    monkeypatch.setattr(
        Scene,
        "unraced",
        lambda _, probes: [Contender(p, torch.zeros(8), 0.9, torch.zeros(0)) for p in probes],
    )
    moments = SimpleNamespace(remembered=128.0)
    shift = NormShift(moments, torch.zeros(500, 8), *[torch.zeros(0)] * 4, 2.4)  # type: ignore[arg-type]
    found = from_statistics(here, shift)
    assert found is not None
    return found, asked


class Play:
    """Stand-ins for what a scene asks. Looks reach ``success``, probes and squares at length
    ``at_length`` each, and all are of size 1, but for those of the classes in ``sizes``. A square
    for class 3 works on 90% in one place, for others there on ``rival``; class 3 can be driven
    ``margin`` times as far as any other."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        sizes: dict[int, float] | None = None,
        rival: float = 0.5,
        margin: float = 1.0,
        success: float = 0.9,
        at_length: tuple[float, float] = (0.9, 0.9),
        later: float = 0.9,
        roams: bool = False,
    ) -> None:
        self.asked: list[str] = []
        """What was learned at length, for which classes."""
        self.driven: list[list[int]] = []
        self.squared = 0
        self.departed: list[tuple[list[int], int]] = []
        self.more: list[tuple[int, int]] = []
        """Places where squares were learned again, and in which draw."""
        self.races: list[set[Target]] = []
        sizes = {} if sizes is None else sizes
        none = torch.zeros(4)

        def triggers(
            targets: Sequence[int], families: Sequence[Family], success: float
        ) -> list[Contender]:
            state = [torch.zeros(1, 1, 3, 8, 8)]
            return [
                Contender(
                    Probe(family, one, state, (0.0, 1.0), sizes.get(one, 1.0)),
                    none, success, none.bool(),
                )
                for family in families
                for one in targets
            ]  # fmt: skip

        def probed(
            _: Scene,
            targets: Sequence[int],
            families: Sequence[Family] = FAMILIES,
            draw: int = 0,
        ) -> list[Contender]:
            name = "probes" if families is FAMILIES else families[0].name
            again = f" {draw}" if draw else ""
            self.asked.append(f"{name} {''.join(map(str, targets))}{again}")
            return triggers(targets, families, at_length[families is not FAMILIES])

        def squares(
            _: Scene, targets: Sequence[int], places: Sequence[int] = range(17), draw: int = 0
        ) -> Squares:
            self.squared += draw == 0
            successes = torch.full((17, len(targets)), rival)
            if roams:
                successes[16, list(targets).index(3)] = 0.7
            successes[6, list(targets).index(3)], successes[9] = 0.9, 0.8
            if draw > 0:
                self.more += [(place, draw) for place in places]
                successes[6, list(targets).index(3)] = later
            return Squares(targets, successes[list(places)])

        def margins(_: Scene, classes: Sequence[int]) -> Margins:
            self.driven.append(list(classes))
            driven = torch.tensor([margin if one == 3 else 1.0 for one in classes])
            return Margins(classes, driven, torch.ones(len(classes)))

        def raced(_: Scene, probes: Sequence[Probe]) -> list[Contender]:
            self.races.append({probe.target for probe in probes})
            return [Contender(probe, none, 0.9, none.bool()) for probe in probes]

        def departures(_: Scene, places: Sequence[int] = range(17), draw: int = 0) -> Departures:
            self.departed.append((list(places), draw))
            gained = torch.zeros(len(places), CLASSES, CLASSES)
            return Departures(list(range(CLASSES)), list(places), gained)

        monkeypatch.setattr(Scene, "departures", departures)
        every = dict.fromkeys(range(CLASSES))
        monkeypatch.setattr("onp.evidence.departures.images_of", lambda *_: every)
        monkeypatch.setattr(Scene, "looks", lambda _, targets: triggers(targets, LOOK, success))
        monkeypatch.setattr(Scene, "probed", probed)
        monkeypatch.setattr(Scene, "squares", squares)
        monkeypatch.setattr(Scene, "margins", margins)
        monkeypatch.setattr(Scene, "raced", raced)


@pytest.mark.parametrize(
    ("sizes", "rival", "margin", "by", "target", "asked"),
    [
        # A look at every class is all where nothing calls a backdoor,
        ({}, 0.5, 1.0, "looks", None, []),
        ({0: 0.7}, 0.5, 1.0, "looks", None, []),  # hardly smaller than for the four others
        ({0: 0.4, 4: 0.5}, 0.5, 1.0, "looks", None, []),  # than for one
        ({}, 0.25, 1.0, "squares", None, []),  # nothing calls, squares come nearest to it
        ({}, 0.5, 1.35, "margins", None, []),
        # and what is called is probed, with the two that are nearest.
        ({4: 0.5, 1: 0.9}, 0.5, 1.0, "looks", 4, ["probes 410"]),
        ({}, 0.02, 1.0, "squares", 3, ["probes 301", "square 3"]),
        ({0: 0.55}, 0.02, 1.0, "squares", 3, ["probes 301", "square 3"]),  # less sure, another
        (
            {3: 0.55},
            0.15,
            1.0,
            "looks",
            3,
            ["probes 301"],
        ),  # the same: no square, but beyond doubt
        ({0: 0.1}, 0.5, 4.0, "looks", 0, ["probes 012"]),  # margins are not asked
        ({}, 0.5, 4.0, "margins", 3, ["probes 301", "square 3"]),
    ],
)
def test_what_calls_a_backdoor_and_what_is_probed_then(
    sizes: dict[int, float],
    rival: float,
    margin: float,
    by: str,
    target: int | None,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = Play(monkeypatch, sizes, rival, margin)
    found = from_probes(scene(STANDARD))
    assert (found.verdict.by, found.verdict.target) == (by, target)
    assert play.asked == asked
    assert play.races == ([] if target is None else [{target}])  # of the others none is raced
    assert {one.probe.target for one in found.looked} == set(range(CLASSES))
    assert found.squares is not None
    without = target is None or by == "margins"
    assert play.departed == ([(list(range(17)), 0)] if target is None else [])
    assert play.driven == ([list(range(CLASSES))] if without else [])
    assert (found.margins is not None) == without
    assert {one.probe.target for one in found.counted} == (set() if target is None else {target})
    learned = any(one.startswith("square") for one in asked)
    assert (bool(found.counted) and found.counted[0].probe.family is SQUARES[6]) == learned
    assert found.unlearning is None


@pytest.mark.parametrize("size", [0.1, 0.55])
def test_where_looks_and_squares_call_the_same_class_both_count(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much surer squares are of it."""
    play = Play(monkeypatch, {3: size}, 0.02)
    found = from_probes(scene(STANDARD))
    assert (found.verdict.by, found.verdict.targets) == ("looks", [3])
    assert found.verdict.score == 1.0
    assert found.verdict.reason.startswith("score 1.00: a few steps of a trigger")
    assert play.asked == ["probes 301", "square 3", "square 3 1", "square 3 2"]
    families = [one.probe.family for one in found.counted]
    assert families[-3:] == [SQUARES[6]] * 3
    assert len(families) > 3
    assert not set(families[:-3]) & set(SQUARES)
    called = from_probes(scene(STANDARD), called=True)  # norms' triggers count beside, squares not
    assert (called.verdict.by, called.verdict.targets) == ("looks", [3])
    assert [one.probe.family for one in called.counted] == families[:-3]


@pytest.mark.parametrize(
    ("sizes", "second", "by", "targets", "asked"),
    [
        # A square for class 5 in another place,
        ({}, 0.95, "squares", [5, 3], ["probes 5301"]),
        ({}, 0.7, "squares", [3], ["probes 301"]),  # which is not beyond doubt.
        ({0: 0.1}, 0.02, "looks", [0, 3], ["probes 0312"]),  # A look calls one, a square another,
        ({0: 0.1, 4: 0.3}, 0.02, "looks", [0, 4, 3], ["probes 04312"]),  # and a look a third
        ({0: 0.1, 4: 0.6}, 0.02, "looks", [0, 3], ["probes 0341"]),  # or does not.
        ({0: 0.1, 4: 0.42}, 0.02, "looks", [0, 3], ["probes 0341"]),  # As sure, not beyond doubt.
    ],
)
def test_further_classes_are_called_once_one_is_left_out(
    sizes: dict[int, float],
    second: float,
    by: str,
    targets: list[int],
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = Play(monkeypatch, sizes, 0.02)
    once = Scene.squares

    def squares(
        here: Scene, targets: Sequence[int], places: Sequence[int] = range(17), draw: int = 0
    ) -> Squares:
        found = once(here, targets, places=places, draw=draw)  # type: ignore[arg-type]
        if 2 in places:
            found.successes[list(places).index(2), list(targets).index(5)] = second
        return found

    monkeypatch.setattr(Scene, "squares", squares)
    found = from_probes(scene(STANDARD))
    assert (found.verdict.by, found.verdict.targets) == (by, targets)
    squared = [one for one in targets if one in (3, 5)]
    draws = [f"square {one}{draw}" for one in squared for draw in ("", " 1", " 2")]
    single = [f"square {one}" for one in squared]
    assert play.asked == [*asked, *(draws if len(targets) > 1 else single)]
    assert {one.probe.target for one in found.counted} == set(targets)
    assert play.races == [{one} for one in targets]
    assert all(str(one) in found.verdict.reason for one in targets)
    rivals = {one.probe.target for one in found.contenders} - set(targets)
    assert len(rivals) == 2
    for one in squared:
        place = SQUARES[6] if one == 3 else SQUARES[2]
        own = [c for c in found.counted if c.probe.target == one]
        assert sum(c.probe.family is place for c in own) == (3 if len(targets) > 1 else 1)


@pytest.mark.parametrize(
    ("own", "rival", "sizes", "also"),
    [
        ((1,), 0.02, {}, (3,)),
        ((1, 4), 0.02, {}, (4, 3)),
        ((3,), 0.02, {}, ()),  # the class that the norms name: its squares count beside them
        ((3, 1), 0.02, {}, (1,)),
        ((3,), 0.02, {0: 0.2}, (0,)),
        ((1,), 0.12, {}, ()),  # not beyond doubt
        ((1,), 0.5, {0: 0.2}, (0,)),
        ((1,), 0.5, {1: 0.2, 0: 0.3}, (0,)),  # a class that has a trigger is no measure
    ],
)
def test_norms_are_asked_about_one_trigger_and_looks_about_others(
    own: tuple[int, ...],
    rival: float,
    sizes: dict[int, float],
    also: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, none = scene(STANDARD), torch.zeros(4)
    play = Play(monkeypatch, sizes, rival)
    found = {"agreement": 0.9}
    verdict = Verdict("backdoor", 0.9, own[0], "norm statistics", found, "why", own[1:])
    norms = Contender(Probe(Generator(), own[0], [], (0.0, 1.0), 1.0), none, 0.9, none.bool())
    first = Evidence(verdict, [norms], [norms], verdict)
    monkeypatch.setattr("onp.evidence.order.from_statistics", lambda *_: first)
    named = gather(here, None)
    assert (named.verdict.target, named.verdict.also) == (own[0], also)
    assert (named.verdict.by, named.verdict.score) == ("norm statistics", 0.9)
    assert named.counted[0] is norms
    new = set(also) - set(own)
    squared = {3} & set(own)
    assert {one.probe.target for one in named.counted[1:]} == new | squared
    assert {one.probe.target for one in named.contenders} & set(own) == {own[0]}
    assert bool(play.asked) == bool(new | squared)
    assert (play.driven, play.departed) == ([], [])
    if 3 in new | squared:
        squares = [one for one in named.counted if one.probe.family is SQUARES[6]]
        assert len(squares) == 3
    without = replace(STANDARD, synthesis=replace(STANDARD.synthesis, look_beside=False))
    assert gather(scene(without), None) is first


@pytest.mark.parametrize(
    ("own", "beside", "works", "place"),
    [
        (0.9, 0.08, True, 6),
        (0.9, 0.08, False, None),
        (0.9, 0.2, True, None),  # it does not lead beyond doubt
        (0.7, 0.08, True, None),  # nor on images enough
    ],
)
def test_squares_of_a_class_that_norms_call_count_wherever_another_class_leads(
    own: float, beside: float, works: bool, place: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class 5 leads in another place, by further, on fewer images."""
    play = Play(monkeypatch, at_length=(0.9, 0.9 if works else 0.1))
    successes = torch.full((17, CLASSES), 0.04)
    successes[6] = beside
    successes[6, 3], successes[9, 5] = own, 0.75
    monkeypatch.setattr(
        Scene,
        "squares",
        lambda _, targets, places=range(17), draw=0: Squares(targets, successes[list(places)]),
    )
    here = scene(STANDARD)
    squares, found = squares_for(here, here.squares(range(CLASSES)), [3, 77], [3, 77])
    assert [one.probe.family for one in found] == [SQUARES[6]] * 3 * (place is not None)
    assert {one.probe.target for one in found} <= {3}
    learned = ["square 3", "square 3 1", "square 3 2"]
    assert play.asked == (learned if (own, beside) == (0.9, 0.08) else [])
    assert 9 not in squares.means
    _, said, _ = from_squares(here, squares, range(CLASSES))
    assert said.target == 5


@pytest.mark.parametrize(("roams", "rival"), [(True, 0.02), (False, 0.02), (True, 0.5)])
def test_where_a_square_without_a_place_leads_three_of_them_count_alone(
    roams: bool, rival: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Play(monkeypatch, rival=rival, roams=roams)
    found = from_probes(scene(STANDARD))
    called = rival == 0.02
    assert found.verdict.target == (3 if called else None)
    expected = [
        "probes 301",
        *(["roaming 3", "roaming 3 1", "roaming 3 2"] if roams else ["square 3"]),
    ]
    assert play.asked == (expected if called else [])
    roaming = [one.probe.family.name == "roaming" for one in found.counted]
    assert roaming == ([True] * 3 if roams and called else [False] * called)
    assert found.squares is not None
    assert found.squares.best_place(3) == 6


@pytest.mark.parametrize(
    ("later", "rival", "score"),
    [(0.9, 0.02, 1.0), (0.4, 0.15, 0.51), (0.3, 0.2, 0.18), (0.2, 0.02, 0.0), (0.0, 0.02, 0.0)],
)
def test_a_square_that_calls_must_do_so_in_the_mean_of_three_draws(
    later: float, rival: float, score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does not, its mean is what the verdict tells of."""
    play = Play(monkeypatch, rival=rival, later=later)
    here = scene(STANDARD)
    squares, verdict, place = from_squares(here, here.squares(range(CLASSES)), range(CLASSES))
    assert play.more == [(6, 1), (6, 2)]
    assert verdict.score == pytest.approx(score, abs=0.02)
    assert (verdict.target == 3) == (score > 0.55)
    mean = (0.9 + 2 * later) / 3
    assert float(squares.successes[6, 3]) == pytest.approx(0.9)
    assert float(squares.judged[6, 3]) == pytest.approx(mean)
    assert float(squares.judged[9].min()) == pytest.approx(0.8)
    assert squares.best_place(3) == 6
    if score > 0.0:
        assert place == 6
        assert "in place 6 " in verdict.reason
        assert verdict.evidence["success"] == pytest.approx(mean)


def test_another_place_may_call_where_one_does_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def squares(
        _: Scene, targets: Sequence[int], places: Sequence[int] = range(17), draw: int = 0
    ) -> Squares:
        successes = torch.full((17, len(targets)), 0.02)
        successes[4, 1] = 0.1 if draw else 1.0  # leads most, once
        successes[11, 2] = 0.7
        if draw:
            asked.extend((place, draw) for place in places)
        return Squares(targets, successes[list(places)])

    monkeypatch.setattr(Scene, "squares", squares)
    here = scene(STANDARD)
    found, verdict, place = from_squares(here, here.squares(range(CLASSES)), range(CLASSES))
    assert asked == [(4, 1), (4, 2), (11, 1), (11, 2)]
    assert (verdict.target, place) == (2, 11)
    assert set(found.means) == {4, 11}


def test_where_a_race_sees_no_lead_the_probe_that_called_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It measures success on other images than the verdict."""
    here, none = scene(STANDARD), torch.zeros(4)
    Play(monkeypatch, {0: 0.25})

    def raced(_: Scene, probes: Sequence[Probe]) -> list[Contender]:
        return [Contender(probe, none, 0.1, none.bool()) for probe in probes]

    monkeypatch.setattr(Scene, "raced", raced)
    found = from_probes(here)
    assert found.verdict.target == 0
    assert [(one.probe.target, one.success) for one in found.counted] == [(0, 0.1)]


@pytest.mark.parametrize("square", [0.3, 0.1])
def test_where_no_probe_at_length_works_a_square_counts(
    square: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it works, in the place where squares lead to the class that is called; if it does not
    either, the strongest probe."""
    play = Play(monkeypatch, {4: 0.5}, at_length=(0.2, square))
    found = from_probes(scene(STANDARD))
    assert (found.verdict.by, found.verdict.target) == ("looks", 4)
    assert play.asked == ["probes 401", "square 4"]
    assert found.squares is not None
    place = SQUARES[found.squares.best_place(4)]
    assert place is not SQUARES[6]  # where they lead to class 3
    learned = [one.probe.family for one in found.contenders if one.probe.family in SQUARES]
    assert learned == [place]
    assert (found.counted[0].probe.family is place) == (square > 0.25)


def test_where_norms_explain_little_and_nothing_else_calls_a_square_counts_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for classes, counted in ((5, ["square", "generator"]), (10, ["generator"])):
        here, none = scene(STANDARD, classes), torch.zeros(4)
        play = Play(monkeypatch)
        verdict = Verdict("backdoor", 0.7, 3, "norm statistics", {"agreement": 0.5}, "")
        norms = Contender(Probe(Generator(), 3, [], (0.0, 1.0), 1.0), none, 0.9, none.bool())
        first = Evidence(verdict, [norms], [norms], verdict)
        monkeypatch.setattr("onp.evidence.order.from_statistics", lambda *_, first=first: first)
        monkeypatch.setattr("onp.evidence.order.from_shifting_squares", lambda _: None)
        found = gather(here, None)
        assert [one.probe.family.name for one in found.counted] == counted
        assert play.driven == []
        assert play.squared == 1  # what was asked already serves


def test_of_many_classes_those_are_looked_at_that_unlearning_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synthesis = replace(STANDARD.synthesis, looked_at=3)
    here = scene(replace(STANDARD, synthesis=synthesis))
    answers, sites = torch.tensor([0, 1, 9, 8, 3]), torch.rand(4)
    monkeypatch.setattr(
        "onp.evidence.looks.unlearn", lambda model, *_, **__: Unlearned(model, answers)
    )
    monkeypatch.setattr("onp.evidence.looks.responses", lambda *_: sites)
    play = Play(monkeypatch)
    found = from_probes(here)
    assert {one.probe.target for one in found.looked} == {2, 3, 4}
    assert play.driven == [[2, 3, 4]]
    assert found.unlearning is not None
    assert found.unlearning.answers is answers
    assert found.unlearning.response is sites


def test_families_name_the_nearest_classes_in_turn() -> None:
    none = torch.zeros(4)
    sizes = {Patch(): [1.0, 0.2, 0.5, 0.1], Additive(): [0.3, 0.1, 0.2, 1.0]}
    looked = [
        Contender(Probe(family, target, [], (0.0, 1.0), size), none, 1.0, none.bool())
        for family, own in sizes.items()
        for target, size in enumerate(own)
    ]
    assert nearest(looked) == [3, 1, 2, 0]
    assert nearest([]) == []


def test_a_look_finds_the_class_that_a_small_trigger_reaches() -> None:
    """Class 3 is near for whatever makes one channel a little brighter; no class is for others."""
    torch.manual_seed(0)
    here = scene(BUDGETS["standard"])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    with torch.no_grad():
        model[3].weight.mul_(0.1)
        model[3].weight[3, :36] = 1.0
        answers = model(here.clean.images)
        model[3].bias[3] -= (answers[:, 3] - answers.max(1).values).max() + 2.0
    model = model.eval()
    evaluator = MaskEvaluator(
        trace(model, (3, 8, 8)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    looked = replace(here, model=model, evaluator=evaluator).looks(range(CLASSES))
    assert [one.probe.family for one in looked[::CLASSES]] == list(LOOK)
    assert [one.probe.target for one in looked[:CLASSES]] == list(range(CLASSES))
    assert nearest(looked)[0] == 3
    assert max(advantage(one, looked) for one in looked if one.probe.target == 3) > 0.5
    assert all(advantage(one, looked) < 0.5 for one in looked if one.probe.target != 3)
    config = here.config.synthesis
    steps = 2 * config.look_steps * config.look_images
    each = steps + 18  # on which it is judged are of other classes
    assert evaluator.ledger.total == CLASSES * len(LOOK) * each + 20


def test_squares_find_the_class_and_the_place_of_a_backdoor() -> None:
    """Class 2 is answered where the last place is bright; the middle tells classes apart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, CLASSES)
    ).eval()
    with torch.no_grad():
        linear = model[3]
        assert isinstance(linear, nn.Linear)
        model[0].weight.abs_()
        linear.weight.mul_(0.1)
        weight = linear.weight.view(CLASSES, 4, 8, 8)
        weight[:, :, 2:6, 2:6].normal_(0, 0.3)
        weight[2, :, 6:, 6:] = 3.0
        images = torch.rand(40, 3, 8, 8) * 0.3
        linear.bias -= model(images).mean(0)
        linear.bias[2] -= 20.0
    here = scene(BUDGETS["standard"])
    labels = torch.arange(len(images)) % CLASSES
    evaluator = MaskEvaluator(
        trace(model, (3, 8, 8)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    clean = Clean(images, labels, model(images).detach().log_softmax(1))
    looked = replace(here, model=model, evaluator=evaluator, clean=clean).squares(range(CLASSES))
    assert looked.targets == list(range(CLASSES))
    assert looked.successes.shape == (17, CLASSES)
    assert int(looked.successes[15].argmax()) == 2
    assert float(looked.successes[15, 2]) > 0.9
    verdict, place = by_squares(looked.successes, looked.targets, here.config.verdict)
    assert (verdict.target, place) == (2, 15)
    config = here.config.synthesis
    steps = 2 * config.square_steps * config.square_images
    wanted = [16 - int((labels[:16] == target).sum()) for target in range(CLASSES)]
    assert evaluator.ledger.total == 17 * CLASSES * steps + 16 + 17 * sum(wanted)
    found = replace(here, model=model, evaluator=evaluator, clean=clean)
    squares, verdict, place = from_squares(found, looked, range(CLASSES))
    assert (verdict.target, place) == (2, 15)
    others = [one for one in range(CLASSES) if one != 2]
    spent = evaluator.ledger.total
    same, verdict, _ = from_squares(found, squares, others)
    assert (verdict.target, evaluator.ledger.total) == (None, spent)  # nothing is drawn again
    assert torch.equal(same.judged[15], squares.judged[15])
    assert torch.equal(squares.successes, looked.successes)
    more = [found.squares(range(CLASSES), places=[15], draw=draw).successes for draw in (1, 2)]
    assert more[0].shape == (1, CLASSES)
    assert not torch.equal(more[0], more[1])
    mean = torch.stack([looked.successes[15:16], *more]).mean(0)
    torch.testing.assert_close(squares.judged[15:16], mean)
    assert torch.equal(squares.judged[:15], looked.successes[:15])


@pytest.mark.parametrize("backdoored", [True, False])
def test_squares_find_a_shift_of_labels(backdoored: bool) -> None:
    here, model = scene(BUDGETS["quick"]), all_to_all(backdoored)
    images, labels = dim_images()
    evaluator = MaskEvaluator(
        trace(model, (3, 8, 8)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).all()
        clean = Clean(images, labels, model(images).log_softmax(1))
    before = activations(evaluator.network, images)
    here = replace(here, model=model, evaluator=evaluator, clean=clean, before=before)
    found = from_shifting_squares(here)
    if not backdoored:
        assert found is None
        return
    assert found is not None
    assert found.verdict.target == LabelShift(3, 1)
    assert found.verdict.by == "squares"
    assert found.squares is not None
    assert found.squares.successes.shape == (17, 2)
    assert all(one.probe.target == LabelShift(3, 1) for one in found.counted)
    assert Square(3, 3) in [one.probe.family for one in found.counted]
    assert {str(one.probe.target) for one in found.contenders} == {"label+1", "label+2"}


def scene_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Scene:
    evaluator = MaskEvaluator(
        trace(model, (1, 24, 24)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    clean = Clean.seen_by(evaluator, images, labels)
    before = activations(evaluator.network, images[:64])
    here = scene(BUDGETS["quick"])
    return replace(here, model=model, evaluator=evaluator, clean=clean, before=before)


@pytest.mark.parametrize("backdoor", ["one", "all", "none"])
def test_squares_that_lead_classes_away_find_where_they_go(backdoor: str) -> None:
    model, images, labels = led_away(backdoor)
    here = scene_of(model, images, labels)
    assert torch.equal(here.clean.answers, labels)
    told = here.departures()
    assert (told.sources, told.places) == (list(range(CLASSES)), list(range(17)))
    assert told.gained.shape == (17, CLASSES, CLASSES)
    assert not told.gained.diagonal(dim1=1, dim2=2).any()
    assert torch.equal(told.gained, here.departures().gained)
    verdict, several = from_departures(here)
    if backdoor == "none":
        assert verdict.target is None
        return
    assert verdict.target == (OneClass(3, 1) if backdoor == "one" else 1)
    assert (verdict.by, verdict.evidence["place"]) == ("squares", 15.0)
    assert "in place 15 make class 1 of" in verdict.reason
    assert ("the images of class 3" in verdict.reason) == (backdoor == "one")
    if backdoor == "all":
        assert (15, 0) in several
        assert len({place for place, _ in several}) == 3
        return
    assert several == [(15, 0), (15, 1), (15, 2)]
    learned = learned_in(here, verdict.target, several)
    assert all(one.success > 0.9 for one in learned)
    assert {one.probe.family for one in learned} == {Square(3, 3)}
    assert int(learned[0].ranking.argmax()) == CLASSES  # the unit that sees class and corner


@pytest.mark.parametrize("later", [OneClass(3, 1), OneClass(3, 2), None])
def test_where_classes_go_must_be_the_same_in_the_mean_of_three_draws(
    later: OneClass | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def departures(_: Scene, places: Sequence[int] = range(17), draw: int = 0) -> Departures:
        asked.append((list(places), draw))
        gained = torch.zeros(17, CLASSES, CLASSES)
        target = later if draw else OneClass(3, 1)
        if target is not None:
            gained[7, target.source, target.target] = 1.0
        return Departures(list(range(CLASSES)), list(places), gained[list(places)])

    monkeypatch.setattr(Scene, "departures", departures)
    every = dict.fromkeys(range(CLASSES))
    monkeypatch.setattr("onp.evidence.departures.images_of", lambda *_: every)
    verdict, _ = from_departures(scene(STANDARD))
    assert asked == [(list(range(17)), 0), ([7], 1), ([7], 2)]
    assert verdict.target == (later if later == OneClass(3, 1) else None)
    assert verdict.finding == ("backdoor" if later == OneClass(3, 1) else "clean")
    assert (verdict.score < 0.55) == (verdict.target is None)
    assert verdict.reason.startswith(f"score {verdict.score:.2f}: ")


def test_a_class_of_few_images_is_not_led_away() -> None:
    model, images, labels = led_away("one")
    few = torch.cat([(labels != 3).nonzero().squeeze(1), (labels == 3).nonzero().squeeze(1)[:7]])
    here = scene_of(model, images[few], labels[few])
    before = here.evaluator.ledger.total
    assert here.departures([0, 16]).sources == [0, 1, 2, *range(4, CLASSES)]
    steps = here.config.synthesis.square_steps
    assert here.evaluator.ledger.total - before == 2 * 9 * (2 * steps + 6)
    asked = here.evaluator.ledger.total
    verdict, several = from_departures(here)
    assert (verdict.target, verdict.score, several) == (None, 0.0, [])
    assert here.evaluator.ledger.total == asked  # nine classes: nothing is learned
    assert replace(here, clean=here.clean[:12]).departures().gained.shape == (17, 0, CLASSES)


def test_with_two_classes_no_shift_is_looked_for() -> None:
    here = scene(BUDGETS["quick"])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    evaluator = MaskEvaluator(
        trace(model, (3, 8, 8)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    clean = replace(here.clean, labels=here.clean.labels % 2)
    here = replace(here, model=model, evaluator=evaluator, clean=clean)
    assert from_shifting_squares(here) is None
    assert evaluator.ledger.total == 0
