"""Which triggers stand for the attacker's, once a class is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onp.config import Config
from onp.probes.contenders import counted_contenders, leading
from onp.probes.families import Family
from onp.probes.probe import Target
from onp.probes.race import Contender
from onp.scene import PLACES, Scene, Squares
from onp.verdict import Verdict

DRAWS = (0, 1, 2)
"""Of squares: the first, and those that a place that speaks for a class is looked at in as well."""


@dataclass(frozen=True)
class Call:
    """What is called, and the squares that stand for its trigger, where they call it too."""

    verdict: Verdict
    draws: Sequence[tuple[int, int]]
    """By place and draw: of one trigger that squares call the first draw, of several, and beside
    looks if squares are beyond doubt, all of them, as one of many has fewer images to be told by.
    """
    alone: bool = False
    """Whether nothing else does."""

    @property
    def target(self) -> int:
        assert isinstance(self.verdict.target, int)
        return self.verdict.target


def standing_for(
    scene: Scene, calls: Sequence[Call], squares: Squares, near: Sequence[int]
) -> tuple[list[Contender], list[Contender]]:
    """Probes of the classes that are called, raced, and of those of ``near`` (the nearest first)
    that are not, as many as there are beside one; and which of them stand for the triggers."""
    own = [one.target for one in calls]
    others = [one for one in near if one not in own][: scene.config.synthesis.classes - 1]
    probed = scene.probed([*own, *others])
    contenders, counted = list[Contender](), list[Contender]()
    for call in calls:
        some = [one for one in probed if one.probe.target in (call.target, *others)]
        place = call.draws[0][0] if call.draws else squares.best_place(call.target)
        raced, stand = standing_for_one(scene, call, some, PLACES[place])
        contenders += [one for one in raced if one.probe.target == call.target]
        counted += stand
    return [*contenders, *(one for one in probed if one.probe.target in others)], counted


def standing_for_one(
    scene: Scene, call: Call, contenders: Sequence[Contender], square: Family
) -> tuple[list[Contender], list[Contender]]:
    """Of the contenders, which are of the class that is called and of others, those of the class
    raced, and which of them stand for its trigger: among them the one that leads most, or the
    ``square``, learned as long as the others, where it was not probes that called or none of them
    works; and beside them further squares of the call. Where its squares stand alone, those that
    work, and nothing else: what may lie anywhere is not told by what lies in one place."""
    verdict, target, config = call.verdict, call.target, scene.config
    several = [one for one in learned_in(scene, target, call.draws) if works(one, config)]
    if several and call.alone:
        contenders = raced_for(scene, target, [*several, *contenders])
        probes = [one.probe for one in several]
        return contenders, [one for one in contenders if one.probe in probes]
    caller = leading(contenders, config.verdict.least_success, target)
    if several and (caller is None or verdict.by == "squares"):
        caller, *several = several
        contenders = [caller, *contenders]
    elif caller is None or verdict.by != "looks":
        learned = scene.probed([target], [square])[0]
        contenders = [learned, *contenders]
        if verdict.by == "squares" or works(learned, config):
            caller = learned
    if caller is None:
        own = (one for one in contenders if one.probe.target == target)
        caller = max(own, key=lambda one: one.success)
    contenders = raced_for(scene, target, contenders)
    counted = counted_contenders(contenders, caller.probe, config.synthesis)
    return [*several, *contenders], [*counted, *several]


def learned_in(scene: Scene, target: Target, several: Sequence[tuple[int, int]]) -> list[Contender]:
    """Squares by place and draw, learned at length for the target, not raced."""
    return [scene.probed([target], [PLACES[place]], draw)[0] for place, draw in several]


def works(contender: Contender, config: Config) -> bool:
    """Whether it is raced at all."""
    return contender.success >= config.race.least_success


def raced_for(scene: Scene, target: Target, contenders: Sequence[Contender]) -> list[Contender]:
    """The target's contenders, raced, and the others as they are."""
    with scene.ledger.stage("race"):
        own = scene.raced([c.probe for c in contenders if c.probe.target == target])
    return own + [one for one in contenders if one.probe.target != target]
