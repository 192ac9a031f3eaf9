"""Is there a backdoor? Two independent findings from clean data; either one calls it.

**Norm statistics.** The batch norms' running means differ from the clean images' by more than
chance, and a trigger that is synthesised to explain the difference, no class being asked for, makes
the network answer one class:

    score = mean of the excess and of the share of images that go to that class, each scaled

**Probes.** Triggers synthesised per class and family:

- advantage: the best probe is smaller, or works better, than the same family's for other classes;
- concentration: after unlearning the network answers that probe's class;
- repairability: the success of that probe can be pruned away at little cost in accuracy.

    score = advantage * (1 + mean(concentration, repairability)) / 2

A clean network can show the last two (unlearning may leave any one class, and some natural
adversarial direction is cheap to prune), so neither counts without the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onp.agent.contenders import advantage
from onp.agent.race import Contender
from onp.config import VerdictConfig
from onp.probes.replay import Replayed
from onp.probes.unlearning import Unlearned


@dataclass(frozen=True)
class Verdict:
    finding: Literal["backdoor", "clean"]
    score: float
    """In [0, 1]; at or above the threshold it is a backdoor."""
    target: int | None
    """The class the backdoor answers, where one was found."""
    by: Literal["norm statistics", "probes"]
    evidence: dict[str, float]
    """The pieces of evidence by name, as measured."""
    reason: str
    """One sentence for people."""


def by_statistics(excess: float, replayed: Replayed, config: VerdictConfig) -> Verdict:
    """Judge the norms' shift (``NormShift.excess``) and the trigger that replays it."""
    score = (_ramp(excess, *config.excess) + _ramp(replayed.share, *config.share)) / 2
    target = replayed.probe.target
    return _verdict(
        score,
        target,
        "norm statistics",
        {"excess": excess, "share": replayed.share, "agreement": replayed.agreement},
        f"the batch norms' means are {excess:.1f} times as far from the clean images' as chance "
        f"has it, and a trigger that explains it moves {100 * replayed.share:.0f}% of the images "
        f"to class {target}",
        config,
    )


def by_probes(
    contenders: Sequence[Contender], unlearned: Unlearned, config: VerdictConfig
) -> Verdict:
    """The verdict of the probe with the strongest evidence."""
    verdicts = [
        judge(
            contender.probe.target,
            advantage(contender, contenders),
            unlearned.share(contender.probe.target),
            contender.score,
            config,
        )
        for contender in contenders
    ]
    return max(verdicts, key=lambda verdict: verdict.score)


def judge(
    target: int,
    strength_ratio: float,
    concentration: float,
    repairability: float,
    config: VerdictConfig,
) -> Verdict:
    """Judge one probe's evidence, each piece scaled to [0, 1] over the range where networks differ.

    strength_ratio: the probe's advantage, a binary logarithm. A probe that was too weak to be
    raced, or whose success no mask can remove at a gain, is no evidence at all.
    """
    support = _ramp(concentration, *config.concentration)
    support = (support + _ramp(repairability, *config.repairability)) / 2
    score = _ramp(strength_ratio, *config.advantage) * (1 + support) / 2
    if repairability <= 0:
        score = 0.0
    return _verdict(
        score,
        target,
        "probes",
        {
            "concentration": concentration,
            "repairability": repairability,
            "advantage": strength_ratio,
        },
        f"unlearning leaves the best probe's class on {100 * concentration:.0f}% of the images, "
        f"its repair is worth {repairability:.2f} of 1, its advantage over other classes is "
        f"2^{strength_ratio:.1f}",
        config,
    )


def _verdict(
    score: float,
    target: int,
    by: Literal["norm statistics", "probes"],
    evidence: dict[str, float],
    reason: str,
    config: VerdictConfig,
) -> Verdict:
    found = score >= config.threshold
    return Verdict(
        "backdoor" if found else "clean",
        score,
        target if found else None,
        by,
        evidence,
        f"score {score:.2f}: {reason}",
    )


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
