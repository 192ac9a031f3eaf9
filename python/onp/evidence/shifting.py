"""Squares that shift all labels by one: an all-to-all backdoor."""

from __future__ import annotations

from onp.evidence.found import Evidence
from onp.evidence.standing import raced_for
from onp.probes.contenders import counted_contenders
from onp.probes.probe import LabelShift
from onp.scene import PLACES, Scene
from onp.verdict import by_shifting_squares

SHIFTS_JUDGED = 64
"""Clean images on which squares are judged that shift labels: fewer of them have to work."""


def from_shifting_squares(scene: Scene) -> Evidence | None:
    """Look for a shift of all labels by one (all-to-all) by squares, against one by two; if it is
    called, probe both with every family and race the first. None if it is not, or where the images
    are of fewer than three classes."""
    config, classes = scene.config, scene.evaluator.trace.num_classes
    present = len(scene.clean.labels[:SHIFTS_JUDGED].unique())
    if present < 3:
        return None
    shift, control = LabelShift(classes, 1), LabelShift(classes, 2)
    squares = scene.squares([shift, control], SHIFTS_JUDGED)
    verdict, place = by_shifting_squares(squares.successes, shift, present, config.verdict)
    if verdict.target is None:
        return None
    caller = scene.probed([shift], PLACES[place : place + 1])[0]
    contenders = raced_for(scene, shift, [caller, *scene.probed([shift, control])])
    counted = counted_contenders(contenders, caller.probe, config.synthesis)
    return Evidence(verdict, contenders, counted, squares=squares)
