"""What the batch norms remember: triggers that explain it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from onp.config import VerdictConfig
from onp.evidence.found import Evidence
from onp.evidence.standing import works
from onp.probes.norm_shift import NormShift, norm_shift
from onp.probes.probe import LabelShift, Probe
from onp.probes.replay import Replayed
from onp.scene import Scene
from onp.verdict import Verdict, by_label_shift, by_statistics, target_of

LEAST_A_CLASS = 4
"""Clean images a class, on average, that the norms' shift is measured on at least."""


def measured_shift(scene: Scene) -> NormShift | None:
    """The norms' shift, on as many clean images as the budget has it, but on some of every class:
    class means are taken out of it."""
    network = scene.evaluator.network
    count = max(scene.config.replay.measured, LEAST_A_CLASS * network.trace.num_classes)
    some = scene.clean[:count]
    return norm_shift(
        network, scene.model, some.images, some.labels,
        valid=scene.valid, seed=scene.seed, ledger=scene.ledger,
    )  # fmt: skip


def from_statistics(scene: Scene, shift: NormShift | None) -> Evidence | None:
    """Replay the norms' shift, as a label shift too if no class speaks clearly: by the first
    family and, if a shift is called, by all. None where there is nothing to replay, or where it
    leads to a class without clean images: the class itself is then what they lack."""
    config = scene.config
    if shift is None or shift.excess < config.replay.least_excess:
        return None
    classes, labels = scene.evaluator.trace.num_classes, scene.clean.labels[: len(shift.clean)]
    with scene.ledger.stage("replay"):
        families = config.replay.families
        (verdict, replayed), steps = in_steps(scene, partial(to_a_class, scene, shift))
        named = target_of(replayed)
        probes = [one.probe for one in replayed if one.probe.target == named]
        if not bool((labels == probes[0].wanted(labels)).any()):
            return None
        if verdict.also:
            jointly = explaining_together(scene, shift, verdict, steps)
            probes = jointly or [o.probe for o in replayed if o.probe.target in verdict.targets]
        if verdict.score < config.verdict.certain and classes > 2:
            (shifted, (one, _)), steps = in_steps(scene, partial(to_the_next, scene, shift))
            if shifted.score > verdict.score:
                verdict, probes = shifted, [one.probe]
                if shifted.target is not None:
                    for name in families[1:]:
                        other = scene.replayed(shift, name, [shifted.target], steps=steps)[0]
                        probes.append(other.probe)
    if verdict.target is None:
        return Evidence(verdict, [], [], verdict)
    with scene.ledger.stage("respond"):
        contenders = sorted(scene.unraced(probes), key=lambda contender: -contender.success)
    own = [one for one in contenders if one.probe.target == verdict.target]
    counted = [one for one in contenders if works(one, config) or one is own[0]]
    stand = {one.probe.target for one in counted}
    verdict = replace(verdict, also=tuple(one for one in verdict.also if one in stand))
    return Evidence(verdict, contenders, counted, verdict)


Judged = tuple[Verdict, list[Replayed]]


def in_steps(scene: Scene, judge: Callable[[int], Judged]) -> tuple[Judged, int]:
    """What triggers of the budget's steps say; where they call a backdoor that is in doubt, what
    those of more steps do; and the steps."""
    replay = scene.config.replay
    found = judge(replay.steps)
    if replay.doubted_steps > replay.steps and doubted(found[0], scene.config.verdict):
        return judge(replay.doubted_steps), replay.doubted_steps
    return found, replay.steps


def doubted(verdict: Verdict, config: VerdictConfig) -> bool:
    """Whether a backdoor is called hardly, or by triggers that explain little or take nearly as
    much effort as those that explain what chance makes."""
    said = verdict.evidence
    little = said.get("agreement", 1.0) < config.certain_agreement
    hard = said.get("effort", 0.0) >= config.doubted_effort
    return verdict.target is not None and (verdict.score < config.certain or little or hard)


def to_a_class(scene: Scene, shift: NormShift, steps: int) -> Judged:
    """A trigger of every family."""
    config = scene.config
    replayed = [scene.replayed(shift, one, steps=steps)[0] for one in config.replay.families]
    known = scene.clean.labels[: len(shift.clean)].unique().tolist()
    excess = beyond_chance(scene, shift)
    return by_statistics(excess, len(shift.clean), replayed, config.verdict, known), replayed


def to_the_next(scene: Scene, shift: NormShift, steps: int) -> Judged:
    """Triggers of the first family that move every label by one, and by two."""
    classes, family = scene.evaluator.trace.num_classes, scene.config.replay.families[0]
    one, two = (
        scene.replayed(shift, family, [LabelShift(classes, by)], steps=steps)[0] for by in (1, 2)
    )
    return by_label_shift(beyond_chance(scene, shift), one, two, scene.config.verdict), [one, two]


def beyond_chance(scene: Scene, shift: NormShift) -> float:
    """The shift's excess, less where norms remember a network that still moved."""
    return shift.excess / (scene.config.verdict.moving if shift.long else 1.0)


def explaining_together(
    scene: Scene, shift: NormShift, verdict: Verdict, steps: int
) -> list[Probe]:
    """Of every family a trigger for each of the classes that are called, which explain the norms'
    shift together; none of families that explain too little of it."""
    config = scene.config.replay
    most = max(config.most_unexplained, (config.least_excess / shift.excess) ** 2)
    return [
        one.probe
        for name in config.families
        for one in scene.replayed(shift, name, verdict.targets, steps=steps)
        if one.unexplained <= most
    ]
