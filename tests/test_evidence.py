"""Which evidence decides, and what probes must show before they are believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import onp.evidence as story
from onp.agent.contenders import advantage
from onp.agent.race import Contender
from onp.clean import Clean
from onp.config import BUDGETS, Config
from onp.evaluate import MaskEvaluator
from onp.evidence import (
    Evidence,
    Scene,
    Squares,
    from_probes,
    from_shifting_squares,
    from_statistics,
    gather,
    in_turn,
)
from onp.ledger import Ledger
from onp.probes.additive import Additive
from onp.probes.families import Family
from onp.probes.margin import Margins
from onp.probes.norm_shift import NormShift
from onp.probes.probe import LabelShift, Probe, Target
from onp.probes.replay import Replayed
from onp.probes.responses import activations
from onp.probes.square import SQUARES, Square
from onp.probes.synthesis import FAMILIES
from onp.probes.unlearning import Unlearned
from onp.suspect.trace import trace
from onp.verdict import Verdict, by_squares
from tests.networks import all_to_all, dim_images

CLASSES = 5
STANDARD = BUDGETS["standard"]
NO_GLANCE = replace(STANDARD, synthesis=replace(STANDARD.synthesis, glance_steps=0))
ANSWERS = torch.tensor([9, 8, 3, 0, 0])
"""Of the network that unlearning leaves: it names the classes 0 to 4 in turn."""


def scene(config: Config) -> Scene:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    clean = Clean(
        torch.rand(20, 3, 8, 8), torch.arange(20) % CLASSES, torch.full((20, CLASSES), -1.6)
    )
    evaluator = MaskEvaluator(
        trace(model.eval(), (3, 8, 8)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    before = [torch.rand(20, 4, 6, 6)]
    return Scene(model, evaluator, clean, before, config, (0.0, 1.0), seed=0)


def no_square_leads(_: Scene, targets: Sequence[int], *__: int) -> Squares:
    return Squares(targets, torch.full((16, len(targets)), 0.4))


def no_margin_leads(_: Scene, classes: Sequence[int]) -> Margins:
    return Margins(classes, torch.ones(len(classes)), torch.ones(len(classes)))


def said(score: float, by: str = "probes") -> Evidence:
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
    monkeypatch.setattr(story, "from_statistics", lambda *_: first)
    second = None if shift is None else said(shift, "squares")
    monkeypatch.setattr(story, "from_shifting_squares", lambda _: second)
    monkeypatch.setattr(story, "from_probes", lambda one, _: (asks.append(one), said(probes))[1])
    assert gather(scene(BUDGETS["quick"]), None).verdict.score == score
    assert bool(asks) == asked


@pytest.mark.parametrize(
    ("agreement", "named", "by", "counted"),
    [
        (0.9, 1, "norm statistics", ["norms"]),  # they explain the shift: alone
        (0.8, 1, "norm statistics", ["probes", "norms"]),
        (0.8, 2, "norm statistics", ["norms"]),  # probes name another class
        (0.6, 2, "probes", ["probes"]),  # they explain little: probes know the class better
    ],
)
def test_triggers_that_explain_a_part_do_not_stand_alone(
    agreement: float, named: int, by: str, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evidence(score: float, ground: str, target: int, name: str) -> Evidence:
        found = {"agreement": agreement} if ground == "norm statistics" else {}
        verdict = Verdict("backdoor", score, target, ground, found, "")  # type: ignore[arg-type]
        one = Contender(name, torch.zeros(4), 0.9, torch.zeros(4))  # type: ignore[arg-type]
        return Evidence(verdict, [one], [one])

    first = evidence(0.7, "norm statistics", 1, "norms")
    monkeypatch.setattr(story, "from_statistics", lambda *_: first)
    monkeypatch.setattr(story, "from_shifting_squares", lambda _: None)
    second = evidence(0.6 if agreement < 0.65 else 0.9, "probes", named, "probes")
    monkeypatch.setattr(story, "from_probes", lambda *_: second)
    found = gather(scene(BUDGETS["standard"]), None)
    assert found.verdict.by == by
    assert [one.probe for one in found.counted] == counted
    quick = gather(scene(BUDGETS["quick"]), None)
    assert [one.probe for one in quick.counted] == (["norms"] if agreement > 0.7 else counted)


def test_where_norms_have_called_margins_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def probes(_: Scene, called: bool) -> Evidence:
        asked.append(called)
        return said(0.1)

    monkeypatch.setattr(story, "from_shifting_squares", lambda _: None)
    monkeypatch.setattr(story, "from_probes", probes)
    for norms in (None, 0.3, 0.58):
        first = None if norms is None else said(norms, "norm statistics")
        monkeypatch.setattr(story, "from_statistics", lambda *_, first=first: first)
        gather(scene(BUDGETS["standard"]), None)
    assert asked == [False, False, True]
    here = scene(BUDGETS["standard"])
    monkeypatch.setattr(Scene, "squares", no_square_leads)
    monkeypatch.setattr(Scene, "margins", lambda *_: pytest.fail("asked"))
    assert from_probes(here, called=True).margins is None


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
    monkeypatch.setattr(Scene, "replayed", lambda *_: Replayed(probe, 0.9, 0.9))
    monkeypatch.setattr(Scene, "unraced", lambda *_: [])
    monkeypatch.setattr(story, "by_label_shift", lambda *_: said(0.0).verdict)
    found = from_statistics(here, shift)
    assert found is not None
    low, high = here.config.verdict.excess
    counted = 2.15 / (here.config.verdict.moving if memory > 100 else 1.0)
    assert found.verdict.evidence["excess"] == pytest.approx(counted)
    assert found.verdict.score == pytest.approx(((counted - low) / (high - low) + 1) / 2)


@pytest.mark.parametrize(
    ("rival", "rivals", "called", "looks"),
    [
        (0.2, 2, True, 2),  # weaker than the suspect: believed
        (0.8, 2, False, 2),  # hardly weaker
        (2.0, 2, False, 2),  # both stronger: three had told by chance
        (2.0, 0, True, 1),  # nobody looked
    ],
)
def test_a_probe_must_lead_further_classes_too(
    rival: float, rivals: int, called: bool, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three classes are probed, one of them four times as strong; then, as that calls a backdoor,
    ``rivals`` more whose probes are ``rival`` times as strong as the suspect's. Only the probes of
    a class that is called are raced."""
    quick = BUDGETS["quick"]
    here = scene(replace(quick, synthesis=replace(quick.synthesis, rivals=rivals)))
    asked: list[list[int]] = []
    races: list[list[Target]] = []

    def probed(_: Scene, targets: Sequence[int], *__: object) -> list[Contender]:
        size = [1.0, 4.0, 4.0] if not asked else [1 / rival] * len(targets)
        asked.append(list(targets))
        state, sites = [torch.zeros(1, 1, 3, 8, 8)], torch.zeros(here.evaluator.trace.sites)
        return [
            Contender(Probe(Additive(), target, state, (0.0, 1.0), one), sites, 1.0, sites.bool())
            for target, one in zip(targets, size, strict=True)
        ]

    def raced(_: Scene, probes: Sequence[Probe]) -> list[Contender]:
        races.append([probe.target for probe in probes])
        sites = torch.ones(here.evaluator.trace.sites)
        return [Contender(probe, sites, 1.0, sites.bool(), score=0.95) for probe in probes]

    monkeypatch.setattr(Scene, "probed", probed)
    monkeypatch.setattr(Scene, "squares", no_square_leads)
    monkeypatch.setattr(Scene, "margins", no_margin_leads)
    monkeypatch.setattr(Scene, "raced", raced)
    found = from_probes(here)
    assert (found.verdict.target is not None) == called
    assert len(asked) == looks
    classes = [target for targets in asked for target in targets]
    assert len(set(classes)) == len(classes) == len(found.contenders)
    assert len(classes) == 3 + (rivals if looks > 1 else 0)
    assert races == ([asked[0][:1]] if called else [])
    if called:
        assert found.verdict.target == asked[0][0]
        assert [one.probe.target for one in found.counted] == asked[0][:1]
    else:
        assert not found.counted


def test_where_a_race_sees_no_lead_the_probe_that_called_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It measures success on other images than the verdict."""
    here = scene(NO_GLANCE)
    sites, state = torch.zeros(here.evaluator.trace.sites), [torch.zeros(1, 1, 3, 8, 8)]

    def contender(probe: Probe, success: float) -> Contender:
        return Contender(probe, sites, success, sites.bool())

    def probed(_: Scene, targets: Sequence[int], *__: object) -> list[Contender]:
        first = here.evaluator.ledger.total == 0
        here.evaluator.ledger.count(1)
        sizes = [0.25 if first and number == 0 else 1.0 for number in range(len(targets))]
        probes = zip(targets, sizes, strict=True)
        return [contender(Probe(Additive(), k, state, (0.0, 1.0), z), 1.0) for k, z in probes]

    def raced(_: Scene, probes: Sequence[Probe]) -> list[Contender]:
        return [contender(probe, 0.1) for probe in probes]

    monkeypatch.setattr(story, "unlearn", lambda model, *_, **__: Unlearned(model, ANSWERS))
    monkeypatch.setattr(Scene, "first_look", lambda *_: looked_at)
    looked_at = [contender(Probe(Additive(), k, state, (0.0, 1.0), 1.0), 1.0) for k in range(5)]
    monkeypatch.setattr(Scene, "probed", probed)
    monkeypatch.setattr(Scene, "squares", no_square_leads)
    monkeypatch.setattr(Scene, "margins", no_margin_leads)
    monkeypatch.setattr(Scene, "raced", raced)
    monkeypatch.setattr(story, "responses", lambda *_: sites)
    found = from_probes(here)
    assert found.verdict.target == 0
    assert [(one.probe.target, one.success) for one in found.counted] == [(0, 0.1)]


@pytest.mark.parametrize(
    ("margin", "leads", "by", "target", "asked"),
    [
        (4.0, False, "margins", 2, [[0, 1, 3], [2], [2]]),  # a class that nothing else had named
        (1.5, False, "margins", None, [[0, 1, 3]]),  # the nearest to calling
        (4.0, True, "probes", 0, [[0, 1, 3], [4, 2]]),  # probes call: nobody asks
    ],
)
def test_margins_are_asked_where_nothing_else_calls(
    margin: float,
    leads: bool,
    by: str,
    target: int | None,
    asked: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they call is probed, and a square counts, where the class's leads most."""
    here = scene(NO_GLANCE)
    calls: list[list[int]] = []
    learned: list[tuple[list[int], list[str]]] = []
    sites, state = torch.zeros(here.evaluator.trace.sites), [torch.zeros(1, 1, 3, 8, 8)]
    answers = torch.tensor([9, 8, 0, 3, 1])  # 0, 1, 3, 4, 2

    def contender(probe: Probe, success: float) -> Contender:
        return Contender(probe, sites, success, sites.bool())

    def look(_: Scene, targets: Sequence[int]) -> list[Contender]:
        one = [Probe(Additive(), target, state, (0.0, 1.0), 1.0) for target in targets]
        return [contender(probe, 0.9) for probe in one]

    def margins(_: Scene, classes: Sequence[int]) -> Margins:
        calls.append(list(classes))
        driven = torch.tensor([margin if one == 2 else 1.0 for one in classes])
        return Margins(classes, driven, torch.ones(5))

    def squares(_: Scene, targets: Sequence[int]) -> Squares:
        successes = torch.full((16, 5), 0.3)
        successes[11, list(targets).index(2)] = 0.45
        successes[3] = 0.48  # better, but so it is for all
        return Squares(targets, successes)

    def probed(
        _: Scene, targets: Sequence[int], families: Sequence[Family] = FAMILIES[:1]
    ) -> list[Contender]:
        learned.append((list(targets), [family.name for family in families]))
        size = 0.25 if leads and 0 in targets else 1.0
        return [
            contender(Probe(family, one, state, (0.0, 1.0), size if one == 0 else 1.0), 0.9)
            for family in families
            for one in targets
        ]

    monkeypatch.setattr(story, "unlearn", lambda model, *_, **__: Unlearned(model, answers))
    monkeypatch.setattr(story, "responses", lambda *_: sites)
    monkeypatch.setattr(Scene, "first_look", look)
    monkeypatch.setattr(Scene, "squares", squares)
    monkeypatch.setattr(Scene, "margins", margins)
    monkeypatch.setattr(Scene, "probed", probed)
    monkeypatch.setattr(Scene, "raced", lambda _, some: [contender(one, 0.9) for one in some])
    found = from_probes(here)
    assert (found.verdict.by, found.verdict.target) == (by, target)
    assert [targets for targets, _ in learned] == asked
    assert calls == ([] if leads else [[0, 1, 3, 4, 2]])
    assert (found.margins is None) == leads
    assert bool(found.counted) == (target is not None)
    assert {one.probe.target for one in found.counted} <= {target}
    if target == 2:
        assert learned[-1] == ([2], ["square"])
        assert found.counted[0].probe.family is SQUARES[11]


def test_two_orders_name_in_turn_and_each_class_once() -> None:
    assert in_turn([4, 1, 2, 0], [1, 4, 0, 2]) == [4, 1, 2, 0]
    assert in_turn([1, 2, 3], [3, 2, 1]) == [1, 3, 2]
    assert in_turn([], []) == []


def test_a_first_look_finds_the_class_that_a_small_patch_reaches() -> None:
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
    looked = replace(here, model=model, evaluator=evaluator).first_look(range(CLASSES))
    assert [one.probe.family.name for one in looked] == ["patch"] * CLASSES
    targets = [one.probe.target for one in looked]
    assert targets[0] == 3
    assert sorted(targets) == list(range(CLASSES))
    assert advantage(looked[0], looked) > 0.5
    config = here.config.synthesis
    steps = 2 * config.look_steps * config.look_images
    assert evaluator.ledger.total == CLASSES * (steps + 16) + 20  # 16 are of other classes


def test_what_the_first_look_names_is_probed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    here = scene(NO_GLANCE)
    asked: list[list[int]] = []

    def unlearned(model: nn.Module, *_: object, **__: object) -> Unlearned:
        return Unlearned(model, ANSWERS)

    def look(_: Scene, targets: Sequence[int]) -> list[Contender]:
        assert list(targets) == [0, 1, 2, 3, 4]
        nothing = torch.zeros(4)
        return [
            Contender(Probe(Additive(), target, [], (0.0, 1.0), 1.0), nothing, 1.0, nothing.bool())
            for target in (4, 0, 1, 2, 3)
        ]

    def probed(_: Scene, targets: Sequence[int], *__: object) -> list[Contender]:
        asked.append(list(targets))
        mask = torch.zeros(here.evaluator.trace.sites, dtype=torch.bool)
        probe = Probe(Additive(), targets[0], [torch.zeros(1, 1, 3, 8, 8)], (0.0, 1.0), 1.0)
        return [Contender(probe, torch.zeros(len(mask)), 1.0, mask)]

    monkeypatch.setattr(story, "unlearn", unlearned)
    monkeypatch.setattr(Scene, "first_look", look)
    monkeypatch.setattr(Scene, "probed", probed)
    monkeypatch.setattr(Scene, "squares", no_square_leads)
    monkeypatch.setattr(Scene, "margins", no_margin_leads)
    found = from_probes(here)
    assert asked == [[4, 0, 1]]
    assert [one.probe.target for one in found.looked] == [4, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sizes", "squares", "margin", "asked", "target"),
    [
        # Nothing leads: a glance at three classes is enough.
        ({}, 0.3, 1.0, ["glance 012"], None),
        # One leads two others, not four: at a glance still.
        ({0: 0.7, 3: 0.7}, 0.3, 1.0, ["glance 012", "glance 34"], None),
        # A lead that does not call is looked at again.
        ({0: 0.7}, 0.3, 1.0, ["glance 012", "glance 34", "probed 012"], None),
        ({0: 0.5}, 0.3, 1.0, ["glance 012", "glance 34", "probed 012", "probed 34"], 0),
        # What squares or margins call is probed.
        ({}, 0.02, 1.0, ["probed 301", "probed 3"], 3),
        ({}, 0.3, 4.0, ["glance 012", "probed 012", "probed 3", "probed 3"], 3),
    ],
)
def test_a_glance_is_enough_where_nothing_leads(
    sizes: dict[int, float],
    squares: float,
    margin: float,
    asked: list[str],
    target: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A probe's size is 1 but where ``sizes`` says less."""
    here = scene(STANDARD)
    calls: list[str] = []
    sites, state = torch.zeros(here.evaluator.trace.sites), [torch.zeros(1, 1, 3, 8, 8)]

    def contenders(targets: Sequence[int]) -> list[Contender]:
        return [
            Contender(
                Probe(Additive(), one, state, (0.0, 1.0), sizes.get(one, 1.0)),
                sites, 0.9, sites.bool(),
            )
            for one in targets
        ]  # fmt: skip

    def noted(name: str) -> Callable[..., list[Contender]]:
        def probed(_: Scene, targets: Sequence[int], *__: object) -> list[Contender]:
            calls.append(f"{name} {''.join(map(str, targets))}")
            return contenders(targets)

        return probed

    def squared(_: Scene, targets: Sequence[int]) -> Squares:
        successes = torch.full((16, 5), squares)
        successes[6, 3] = 0.9
        return Squares(targets, successes)

    def margins(_: Scene, classes: Sequence[int]) -> Margins:
        return Margins(classes, torch.tensor([1.0, 1.0, 1.0, margin, 1.0]), torch.ones(5))

    monkeypatch.setattr(story, "unlearn", lambda model, *_, **__: Unlearned(model, ANSWERS))
    monkeypatch.setattr(story, "responses", lambda *_: sites)
    monkeypatch.setattr(Scene, "first_look", lambda _, targets: contenders(targets))
    monkeypatch.setattr(Scene, "glance", noted("glance"))
    monkeypatch.setattr(Scene, "probed", noted("probed"))
    monkeypatch.setattr(Scene, "squares", squared)
    monkeypatch.setattr(Scene, "margins", margins)
    monkeypatch.setattr(
        Scene, "raced", lambda _, some: [Contender(p, sites, 0.9, sites.bool()) for p in some]
    )
    found = from_probes(here)
    assert calls == asked
    assert found.verdict.target == target


@pytest.mark.parametrize(
    ("rival", "small", "by", "target", "learned"),
    [
        (0.02, None, "squares", 3, True),  # the probes say nothing
        (0.02, (0, 0.55), "squares", 3, True),  # less, and of another class
        (0.02, (3, 0.55), "squares", 3, True),
        (0.02, (3, 0.1), "probes", 3, False),  # as sure as squares: they do without one
        (0.3, (0, 0.55), "probes", 0, False),  # squares do not call
        (0.2, None, "squares", None, False),  # neither does, squares come nearer to it
    ],
)
def test_squares_and_probes(
    rival: float,
    small: tuple[int, float] | None,
    by: str,
    target: int | None,
    learned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A square for class 3 works on 90% of the images, for others in its place on ``rival``;
    probes are of size 1, but for those of one class."""
    here = scene(NO_GLANCE)
    asked: list[tuple[list[int], list[str]]] = []
    sites, state = torch.zeros(here.evaluator.trace.sites), [torch.zeros(1, 1, 3, 8, 8)]

    def contender(probe: Probe) -> Contender:
        return Contender(probe, sites, 0.9, sites.bool())

    def look(_: Scene, targets: Sequence[int]) -> list[Contender]:
        return [contender(Probe(Additive(), target, state, (0.0, 1.0), 1.0)) for target in targets]

    def squares(_: Scene, targets: Sequence[int]) -> Squares:
        assert list(targets) == [0, 1, 2, 3, 4]
        successes = torch.full((16, 5), rival)
        successes[6, 3], successes[9] = 0.9, 0.8
        return Squares(targets, successes)

    def probed(
        _: Scene, targets: Sequence[int], families: Sequence[Family] = FAMILIES
    ) -> list[Contender]:
        asked.append((list(targets), [family.name for family in families]))
        sizes = {} if small is None else dict([small])
        return [
            contender(Probe(family, target, state, (0.0, 1.0), sizes.get(target, 1.0)))
            for family in families
            for target in targets
        ]

    monkeypatch.setattr(story, "unlearn", lambda model, *_, **__: Unlearned(model, ANSWERS))
    monkeypatch.setattr(story, "responses", lambda *_: sites)
    monkeypatch.setattr(Scene, "first_look", look)
    monkeypatch.setattr(Scene, "squares", squares)
    monkeypatch.setattr(Scene, "margins", no_margin_leads)
    monkeypatch.setattr(Scene, "probed", probed)
    monkeypatch.setattr(Scene, "raced", lambda _, probes: [contender(one) for one in probes])
    found = from_probes(here)
    assert (found.verdict.by, found.verdict.target) == (by, target)
    called = rival < 0.1
    assert asked[0][0] == ([3, 0, 1] if called else [0, 1, 2])  # what a square calls is probed
    assert (asked[-1] == ([3], ["square"])) == learned
    assert found.squares is not None
    if target is None:
        assert found.counted == []
        return
    first = found.counted[0].probe
    assert first.target == target
    assert (first.family == Square(1, 2)) == learned


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
    assert looked.successes.shape == (16, CLASSES)
    assert int(looked.successes[15].argmax()) == 2
    assert float(looked.successes[15, 2]) > 0.9
    verdict, place = by_squares(looked.successes, looked.targets, here.config.verdict)
    assert (verdict.target, place) == (2, 15)
    config = here.config.synthesis
    steps = 2 * config.square_steps * config.square_images
    wanted = [16 - int((labels[:16] == target).sum()) for target in range(CLASSES)]
    assert evaluator.ledger.total == 16 * CLASSES * steps + 16 + 16 * sum(wanted)


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
    assert found.squares.successes.shape == (16, 2)
    assert all(one.probe.target == LabelShift(3, 1) for one in found.counted)
    assert Square(3, 3) in [one.probe.family for one in found.counted]
    assert {str(one.probe.target) for one in found.contenders} == {"label+1", "label+2"}


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
