"""A class that whoever asks for the repair suspects, whatever the evidence says of it."""

from __future__ import annotations

from dataclasses import replace

from onp.evidence.found import Evidence
from onp.evidence.looks import nearest, squares_for, suspects
from onp.evidence.standing import Call, standing_for, works
from onp.probes.norm_shift import NormShift
from onp.probes.probe import classes_of
from onp.probes.race import Contender
from onp.scene import Scene
from onp.verdict import named


def with_told(scene: Scene, shift: NormShift | None, found: Evidence, target: int) -> Evidence:
    """What was found, and the class ``target``, if that does not answer it already: its probes of
    every family count that lead those for the classes that are nearest to it, squares from three
    starts if they lead to it beyond doubt and, where nothing else was called, what explains the
    norms' shift by it alone. That somebody names a class is no evidence: the score stays."""
    called = found.verdict.targets
    if target in (one for answered in called for one in classes_of(answered)):
        return found
    looked, unlearning = found.looked, found.unlearning
    if not looked:
        classes, unlearning = suspects(scene)
        looked = scene.looks(sorted({target, *classes}))
    squares = found.squares
    if squares is None or target not in squares.targets:
        squares = scene.squares(sorted({target, *nearest(looked)}))
    squares, own = squares_for(scene, squares, [target], [target, *called])
    verdict = named(found.verdict, target)
    call = Call(replace(verdict, target=target, by="looks"), [])  # no square but those
    near = [one for one in nearest(looked) if one not in called]
    contenders, counted = standing_for(scene, [call], squares, near)
    explaining = [] if called or shift is None else explained_by(scene, shift, target)
    return replace(
        found,
        verdict=verdict,
        contenders=[
            *(one for one in found.contenders if one.probe.target in called),
            *contenders, *own, *explaining,
        ],
        counted=[*found.counted, *counted, *own, *explaining],
        looked=looked, squares=squares, unlearning=unlearning,
    )  # fmt: skip


def explained_by(scene: Scene, shift: NormShift, target: int) -> list[Contender]:
    """Of every family a trigger for the class that explains the norms' shift, if there is more of
    it than chance makes: those that explain half of it and work."""
    config = scene.config.replay
    if shift.excess < config.least_excess:
        return []
    with scene.ledger.stage("replay"):
        replayed = [scene.replayed(shift, name, [target])[0] for name in config.families]
    probes = [one.probe for one in replayed if one.unexplained <= config.most_unexplained]
    with scene.ledger.stage("respond"):
        return [one for one in scene.unraced(probes) if works(one, scene.config)]
