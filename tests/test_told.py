"""A class that somebody names counts, whatever the evidence says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onp.evidence import Evidence, gather
from onp.probes.generator import Generator
from onp.probes.norm_shift import NormShift
from onp.probes.patch import Patch
from onp.probes.probe import LabelShift, OneClass, Probe, Target
from onp.probes.race import Contender
from onp.probes.replay import Replayed
from onp.probes.square import SQUARES
from onp.probes.synthesis import FAMILIES
from onp.scene import Scene
from onp.verdict import Verdict
from tests.test_evidence import STANDARD, Play, scene

NONE = torch.zeros(4)


def decided(
    monkeypatch: pytest.MonkeyPatch, targets: list[Target], counted: list[Contender]
) -> Evidence:
    """What the evidence says of itself, if that is these targets, by norms."""
    finding = "backdoor" if targets else "clean"
    verdict = Verdict(
        finding, 0.2, next(iter(targets), None), "norm statistics", {}, "score 0.20: x"
    )
    found = Evidence(verdict, [*counted], counted, verdict)
    monkeypatch.setattr("onp.evidence.order.deciding", lambda *_: found)
    return found


@pytest.mark.parametrize("target", [3, 4])
def test_it_is_probed_though_nothing_calls_it(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares lead to class 3 alone, so they count for it and for no other."""
    here, play = scene(STANDARD), Play(monkeypatch, {target: 0.8}, rival=0.1)
    nothing = decided(monkeypatch, [], [])
    found = gather(here, None, target)
    assert (found.verdict.finding, found.verdict.targets) == ("suspected", [target])
    assert (found.verdict.by, found.verdict.score) == ("norm statistics", 0.2)
    assert not found.verdict.by_norms
    assert found.verdict.reason.startswith("score 0.20: x; nothing is called, but")
    assert {one.probe.target for one in found.counted} == {target}
    assert {one.probe.family for one in found.counted} <= {*FAMILIES, SQUARES[6]}
    squares = [one for one in found.counted if one.probe.family in SQUARES]
    assert len(squares) == (3 if target == 3 else 0)
    assert play.squared == 1
    assert gather(here, None) is nothing


@pytest.mark.parametrize("called", [1, LabelShift(10), OneClass(2, 1)], ids=str)
def test_what_is_called_already_is_not_asked_again(
    called: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = decided(monkeypatch, [called], [])
    assert gather(scene(STANDARD), None, 1) is found


def test_it_stands_beside_the_class_that_is_called_which_is_no_rival(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Class 1 is reached most easily of all, as it has a backdoor."""
    play = Play(monkeypatch, {1: 0.1, 4: 0.5})
    norms = Contender(Probe(Generator(), 1, [], (0.0, 1.0), 1.0), NONE, 0.9, NONE.bool())
    rival = Contender(Probe(Patch(), 4, [], (0.0, 1.0), 1.0), NONE, 0.9, NONE.bool())
    first = decided(monkeypatch, [1], [norms])
    first.contenders.append(rival)
    shift: Any = SimpleNamespace(excess=9.0)  # which is class 1's
    found = gather(scene(STANDARD), shift, 4)
    assert (found.verdict.finding, found.verdict.targets) == ("backdoor", [1, 4])
    assert found.verdict.by_norms
    assert found.verdict.reason == "score 0.20: x; class 4 was named as suspect"
    (asked,) = (one for one in play.asked if one.startswith("probes"))
    assert "4" in asked
    assert "1" not in asked
    own = [one for one in found.counted if one.probe.target == 4]
    assert own
    assert found.counted == [norms, *own]
    assert rival not in found.contenders


def test_what_explains_the_norms_shift_by_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it explains half of the shift and works; and if there is a shift at all."""
    Play(monkeypatch)
    decided(monkeypatch, [], [])
    families = STANDARD.replay.families
    made = {name: Probe(Generator(), 4, [], (0.0, 1.0), 1.0) for name in families}
    unexplained = dict(zip(families, (0.2, 0.9, 0.3, 0.2, 0.2), strict=True))
    works = dict(zip(made.values(), (0.9, 0.9, 0.1, 0.9, 0.9), strict=True))

    def replayed(_: Scene, __: NormShift, family: str, targets: list[Target]) -> list[Replayed]:
        assert targets == [4]
        return [SimpleNamespace(probe=made[family], unexplained=unexplained[family])]  # type: ignore[list-item]

    def unraced(_: Scene, probes: list[Probe]) -> list[Contender]:
        return [Contender(one, NONE, works[one], NONE.bool()) for one in probes]

    monkeypatch.setattr(Scene, "replayed", replayed)
    monkeypatch.setattr(Scene, "unraced", unraced)
    least = STANDARD.replay.least_excess
    for excess, counted in ((least, [0, 3, 4]), (least - 0.1, [])):
        shift: Any = SimpleNamespace(excess=excess)
        found = gather(scene(STANDARD), shift, 4)
        explaining = [one.probe for one in found.counted if one.probe in works]
        assert explaining == [list(made.values())[one] for one in counted]
