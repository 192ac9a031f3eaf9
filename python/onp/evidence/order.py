"""In which order evidence is asked for, and which of it decides."""

from __future__ import annotations

from dataclasses import replace

from onp.config import Config
from onp.evidence.found import Evidence
from onp.evidence.looks import from_looks, from_probes, nearest, squares_for, suspects
from onp.evidence.norms import from_statistics
from onp.evidence.shifting import from_shifting_squares
from onp.evidence.standing import standing_for, works
from onp.evidence.told import with_told
from onp.probes.norm_shift import NormShift
from onp.scene import PLACES, Scene, Squares
from onp.verdict import MANY_CLASSES, also_called, beyond_doubt


def gather(scene: Scene, shift: NormShift | None, told: int | None = None) -> Evidence:
    """What decides, and the class that was ``told``, if one was."""
    found = deciding(scene, shift)
    return found if told is None else with_told(scene, shift, found, told)


def deciding(scene: Scene, shift: NormShift | None) -> Evidence:
    """The norm statistics' evidence if it is certain, and what probes find for the same class if
    its triggers explain only a part of the shift, or a square, where classes are few; else that of
    squares for a shift of labels, of probes where these call none, or the norms', whichever is
    stronger. Where the norms' triggers explain little, probes that call a backdoor know its class
    better. Where they explain it all, other classes may have triggers of their own."""
    config = scene.config
    first = from_statistics(scene, shift)
    called = first is not None and first.verdict.target is not None
    agreement = 1.0 if first is None else first.verdict.evidence.get("agreement", 1.0)
    certain = first is not None and first.verdict.score >= config.verdict.certain
    few = scene.evaluator.trace.num_classes < MANY_CLASSES
    if first is not None and certain and agreement >= config.verdict.certain_agreement:
        if few:
            return with_square(scene, first, None)
        if agreement >= config.replay.alone or first.verdict.also:
            return with_others(scene, first)
        return together(first, from_probes(scene, called), config)
    second = from_shifting_squares(scene) or from_probes(scene, called)
    if first is None:
        return second
    agree = agreement >= config.verdict.certain_agreement
    if called and agree and beyond_doubt(second.verdict, config.verdict):
        return together(first, second, config)
    named = second.verdict.target is not None and agreement < config.verdict.certain_agreement
    if called and not named and first.verdict.score > second.verdict.score:
        return with_square(scene, first, second.squares) if few else first
    return replace(second, statistics=first.verdict)


def together(first: Evidence, second: Evidence, config: Config) -> Evidence:
    """The verdict of the first, and what counts in either, of the classes that the second calls as
    the first does or beyond doubt."""
    said = second.verdict
    known = [first.verdict.target, *said.also]
    sure = [one for one in said.targets if one in known or beyond_doubt(said, config.verdict)]
    if not sure:
        return first
    also = tuple(one for one in sure[1:] if isinstance(one, int))
    return replace(
        second,
        verdict=also_called(first.verdict, [replace(said, target=sure[0], also=also)]),
        contenders=[*second.contenders, *first.contenders],
        counted=[*(one for one in second.counted if one.probe.target in sure), *first.counted],
        statistics=first.statistics,
    )


def with_others(scene: Scene, found: Evidence) -> Evidence:
    """Norms tell of the trigger that moved them most: what looks and squares call beyond doubt
    beside its class counts as well, if the budget has it asked, and squares that call its own
    class so, as an attacker may have taught a second way to it."""
    taken = [one for one in found.verdict.targets if isinstance(one, int)]
    if not scene.config.synthesis.look_beside or not taken:
        return found
    classes, unlearning = suspects(scene)
    looked = scene.looks(classes)
    squares, calls = from_looks(scene, looked, scene.squares(classes), taken=taken)
    near = [one for one in nearest(looked) if one not in taken]
    contenders, counted = standing_for(scene, calls, squares, near) if calls else ([], [])
    verdict = also_called(found.verdict, [one.verdict for one in calls])
    squares, own = squares_for(scene, squares, taken, verdict.targets)
    return replace(
        found,
        verdict=verdict,
        contenders=[*found.contenders, *contenders, *own],
        counted=[*found.counted, *counted, *own],
        looked=looked, squares=squares, unlearning=unlearning,
    )  # fmt: skip


def with_square(scene: Scene, found: Evidence, squares: Squares | None) -> Evidence:
    """Among few classes much else explains the norms' shift as well as the attacker's trigger does:
    a square of the class that is called counts beside the norms' triggers, learned where squares
    (those given, if the class was asked for) lead to it most, if it works."""
    target = found.verdict.target
    if not isinstance(target, int):
        return found
    if squares is None or target not in squares.targets:
        squares = scene.squares(range(scene.evaluator.trace.num_classes))
    learned = scene.probed([target], [PLACES[squares.best_place(target)]])[0]
    counted = [learned, *found.counted] if works(learned, scene.config) else found.counted
    return replace(found, contenders=[learned, *found.contenders], counted=counted, squares=squares)
