"""A class that whoever asks for the repair suspects, whatever the evidence says of it."""

from __future__ import annotations

from dataclasses import replace

from onp.evidence.found import Evidence
from onp.evidence.looks import nearest, squares_for, suspects
from onp.evidence.norms import explaining_together
from onp.evidence.standing import Call, standing_for, works
from onp.probes.norm_shift import NormShift
from onp.scene import Scene
from onp.verdict import also_called, named


def with_told(scene: Scene, shift: NormShift | None, found: Evidence, target: int) -> Evidence:
    """What was found, and the class ``target``, if it is not what was found: its probes of every
    family count, judged against those for the classes that are nearest, its squares from three
    starts where they lead to it most, and what explains the norms' shift by it alone. That
    somebody names a class is no evidence: the score stays what it was."""
    if target in found.verdict.targets:
        return found
    classes, _, _ = suspects(scene)
    looked = found.looked or scene.looks(classes)
    squares = found.squares
    if squares is None or target not in squares.targets:
        squares = scene.squares(sorted({target, *classes}))
    told = named(found.verdict, target)
    squares, own = squares_for(scene, squares, [target], [target, *found.verdict.targets])
    call = Call(replace(told, by="probes"), [])
    contenders, counted = standing_for(scene, [call], squares, nearest(looked))
    contenders, counted = [*contenders, *own], [*counted, *own]
    if shift is not None and shift.excess >= scene.config.replay.least_excess:
        with scene.ledger.stage("replay"):
            explaining = explaining_together(scene, shift, told)
        with scene.ledger.stage("respond"):
            replayed = [one for one in scene.unraced(explaining) if works(one, scene.config)]
        contenders, counted = [*contenders, *replayed], [*counted, *replayed]
    clean = found.verdict.target is None
    return replace(
        found,
        verdict=told if clean else also_called(found.verdict, [told]),
        contenders=[*found.contenders, *contenders],
        counted=[*found.counted, *counted],
        looked=looked, squares=squares,
    )  # fmt: skip
