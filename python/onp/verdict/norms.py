"""What the batch norms' statistics say, by the triggers that explain them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from onp.config import VerdictConfig
from onp.probes.patch import Patch
from onp.probes.probe import Target
from onp.probes.replay import Replayed
from onp.verdict.finding import MANY_CLASSES, Verdict, judged, ramp, shifts_more

EFFORT_IMAGES = 500
"""Clean images in whose chance an effort counts the excess: with fewer, chance is larger."""
LEAST_AGREEMENT = 0.1
"""A trigger that agrees less with the norms' shift explains as much of it as this."""
MOST = 0.5
"""Share of the images that come to the classes of several triggers together, at least."""
FURTHER = 2
"""Classes, at most, that norms name beside the first."""


def by_statistics(
    excess: float,
    images: int,
    replayed: Sequence[Replayed],
    config: VerdictConfig,
    known: Sequence[int] | None = None,
) -> Verdict:
    """Judge the norms' shift (how far it is beyond chance, measured on so many images) and the
    triggers that replay it. known: classes that the clean images have; default: all."""
    target = target_of(replayed)
    also = also_answered(replayed, target, config, known)
    own = [one for one in replayed if one.probe.target == target]
    share = sum(one.share for one in own) / len(replayed)
    if also:
        moved = [one.gains[[target, *also]].sum() for one in replayed]
        share = float(torch.stack(moved).clamp_min(0.0).mean())
    efforts = [
        one.probe.size / max(one.agreement, LEAST_AGREEMENT)
        for one in replayed
        if one.probe.family.name == Patch.name
    ]
    effort = min(efforts, default=0.0) / excess * math.sqrt(images / EFFORT_IMAGES)
    score = (ramp(excess, *config.excess) + ramp(share, *config.share)) / 2
    score *= 1.0 - ramp(effort, *config.effort)
    alike = [one.agreement for one in own]
    return judged(
        score,
        target,
        "norm statistics",
        {
            "excess": excess,
            "share": share,
            "agreement": sum(alike) / len(alike),
            "effort": effort,
        },
        f"the batch norms' moments are {excess:.1f} times as far from the clean images' as chance "
        f"has it, and {len(replayed)} triggers that explain it move {100 * share:.0f}% of the "
        f"images to {' and '.join(f'class {one}' for one in (target, *also))} on average",
        config,
        also,
    )


def target_of(replayed: Sequence[Replayed]) -> Target:
    """What the replayed triggers answer: each speaks with the share of images that it moves, as far
    as it agrees with the shift."""
    said: dict[Target, float] = {}
    for one in replayed:
        voice = one.share * max(one.agreement, 0.0)
        said[one.probe.target] = said.get(one.probe.target, 0.0) + voice
    return max(said, key=lambda target: said[target])


def also_answered(
    replayed: Sequence[Replayed],
    target: Target,
    config: VerdictConfig,
    known: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Classes other than the target that triggers which agree with the norms' shift bring a share
    (``beside``) of the images to, as a mean over them by their agreement, the largest first: of one
    attacker's trigger there are none. Two at most; none unless most images come to these and the
    target, as an all-to-all backdoor's go everywhere; none of classes that the clean images lack,
    if ``known`` names those that they have, as a class that is lacking looks like a trigger; and
    none among fewer than ten classes, where much else looks like one."""
    agreeing = [one for one in replayed if one.agreement >= config.certain_agreement]
    if not agreeing or not isinstance(target, int) or len(agreeing[0].gains) < MANY_CLASSES:
        return ()
    weights = torch.tensor([one.agreement for one in agreeing])
    gains = torch.stack([one.gains for one in agreeing])
    means = ((weights[:, None] * gains).sum(0) / weights.sum()).tolist()
    others = sorted(set(range(len(means))) - {target}, key=lambda one: -means[one])
    also = [one for one in others if means[one] >= config.beside][:FURTHER]
    if means[target] + sum(means[one] for one in also) < MOST:
        return ()
    return tuple(one for one in also if known is None or one in known)


def by_label_shift(
    excess: float, shifted: Replayed, control: Replayed, config: VerdictConfig
) -> Verdict:
    """Judge triggers that replay the shift and move labels by one (``shifted``) and by two."""
    stronger = shifts_more(shifted.share, control.share)
    support = min(ramp(stronger, *config.shift), ramp(shifted.share, *config.share))
    score = (ramp(excess, *config.excess) + support) / 2
    return judged(
        score,
        shifted.probe.target,
        "norm statistics",
        {"excess": excess, "share": shifted.share, "advantage": stronger},
        f"the batch norms' moments are {excess:.1f} times as far from the clean images' as chance "
        f"has it, and a trigger that explains it turns {100 * shifted.share:.0f}% of unseen images "
        f"into the next class (into the one after it: {100 * control.share:.0f}%)",
        config,
    )
