"""Is there a backdoor? Three pieces of evidence from clean data.

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
from onp.probes.unlearning import Unlearned


@dataclass(frozen=True)
class Verdict:
    finding: Literal["backdoor", "clean"]
    score: float
    """In [0, 1]; at or above the threshold it is a backdoor."""
    target: int | None
    """The class the backdoor answers, where one was found."""
    concentration: float
    repairability: float
    advantage: float

    @property
    def reason(self) -> str:
        return (
            f"score {self.score:.2f}: unlearning leaves the best probe's class on "
            f"{100 * self.concentration:.0f}% of the images, its repair is worth "
            f"{self.repairability:.2f} of 1, its advantage over other classes is "
            f"2^{self.advantage:.1f}"
        )


def weigh(contenders: Sequence[Contender], unlearned: Unlearned, config: VerdictConfig) -> Verdict:
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
    found = score >= config.threshold
    return Verdict(
        "backdoor" if found else "clean",
        score,
        target if found else None,
        concentration,
        repairability,
        strength_ratio,
    )


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
