"""Which probes count: judged against what the same family needs for another class.

A probe that does not match the attack finds a natural adversarial direction. Those exist for every
class alike, so a probe speaks of a backdoor only where it is stronger than its sisters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onp.config import Config, SynthesisConfig
from onp.evaluate import MaskEvaluator
from onp.probes.probe import Probe, Target
from onp.probes.race import Contender

TOGETHER = 16
"""Probes whose triggered images are run in one call."""
LEAST_STRENGTH = 1e-6
"""So that a lead stays finite."""
SMALLEST = 0.05
"""Sizes below this share of the reference count as this: smaller ones are equally suspicious."""


def strength(success: float, size: float) -> float:
    """Success per size: what a probe achieves for how much of its bound it uses; none for a size
    that is no number."""
    return max(success, 1e-2) / max(size, SMALLEST) if math.isfinite(size) else 0.0


def advantage(contender: Contender, contenders: Sequence[Contender]) -> float:
    """Binary logarithm of the contender's strength over the strongest of its family for another
    class; 0 if no other class was probed."""
    rivals = rivalling(contender.probe, contenders)
    if not rivals:
        return 0.0
    own = strength(contender.success, contender.probe.size)
    return math.log2(max(own, LEAST_STRENGTH) / max(*rivals, LEAST_STRENGTH))


def rivalling(probe: Probe, contenders: Sequence[Contender]) -> list[float]:
    """Strengths of those of the probe's family that are for another class."""
    return [
        strength(other.success, other.probe.size)
        for other in contenders
        if other.probe.family.name == probe.family.name and other.probe.target != probe.target
    ]


def leading(
    contenders: Sequence[Contender], least_success: float, target: Target | None = None
) -> Contender | None:
    """The one with the largest advantage of those (for the target, if one is named) that reach
    ``least_success``, if any does."""
    working = (
        one
        for one in contenders
        if one.success >= least_success and target in (None, one.probe.target)
    )
    return max(working, key=lambda one: advantage(one, contenders), default=None)


def counted_contenders(
    contenders: Sequence[Contender], caller: Probe, config: SynthesisConfig
) -> list[Contender]:
    """Of the target's contenders those that are stronger than their sisters: the most repairable
    one, those nearly as repairable, the best first, then those that lead by far. The one whose
    probe called the backdoor is among them, if need be in front."""
    leads = {
        c: lead
        for c in contenders
        if c.probe.target == caller.target and c.size > 0 and (lead := advantage(c, contenders)) > 0
    }
    best = max((c.score for c in leads), default=0.0)
    near = [c for c in leads if c.score >= best - config.counted_margin]
    far = [
        c
        for c, lead in leads.items()
        if c not in near and lead >= config.counted_lead and c.success >= config.counted_success
    ]
    near.sort(key=lambda c: -c.score)
    far.sort(key=lambda c: -leads[c])
    counted = (near + far)[: config.counted]
    left_out = [c for c in contenders if c.probe is caller and c not in counted]
    return (left_out + counted)[: config.counted]


def getting_through(
    probes: Sequence[Probe],
    evaluator: MaskEvaluator,
    mask: Tensor,
    images: Tensor,
    labels: Tensor,
    contenders: Sequence[Contender],
    config: Config,
) -> list[Probe]:
    """The probes that still work on the network pruned by ``mask`` bool [S] and are stronger than
    what another class needs on the suspect."""
    count = min(config.race.second_images, len(images))
    reached = successes_of(probes, evaluator, mask, images[:count], labels[:count])
    found = []
    for probe, success in zip(probes, reached, strict=True):
        bar = max(rivalling(probe, contenders), default=0.0) * 2**config.synthesis.through_strength
        if success >= config.synthesis.through_success and strength(success, probe.size) > bar:
            found.append(probe)
    return found


def successes_of(
    probes: Sequence[Probe], evaluator: MaskEvaluator, mask: Tensor, images: Tensor, labels: Tensor
) -> list[float]:
    """Mean excess probability of each probe's target under ``mask`` bool [S], on the images of
    other classes; 0 where there are none."""
    clean = evaluator.run(mask[None], images)[0].softmax(1)
    found = list[float]()
    for first in range(0, len(probes), TOGETHER):
        some = probes[first : first + TOGETHER]
        others = [probe.wanted(labels) != labels for probe in some]
        triggered = [probe(images[other]) for probe, other in zip(some, others, strict=True)]
        chances = evaluator.run(mask[None], torch.cat(triggered))[0].softmax(1)
        parts = chances.split([len(part) for part in triggered])
        for probe, other, chance in zip(some, others, parts, strict=True):
            wanted = probe.wanted(labels)[other][:, None]
            excess = chance.gather(1, wanted) - clean[other].gather(1, wanted)
            excess = excess.nan_to_num(0.0).clamp_min(0)  # an answer that is no number is none
            found.append(float(excess.mean()) if len(chance) else 0.0)
    return found
