"""Is there a backdoor? Three pieces of evidence from clean data.

- advantage: the best probe is smaller, or works better, than the same family's for other classes;
- concentration: after unlearning the network answers that probe's class;
- repairability: the success of that probe can be pruned away at little cost in accuracy.

    score = advantage * (1 + mean(concentration, repairability)) / 2

A clean network can show the last two (unlearning may leave any one class, and some natural
adversarial direction is cheap to prune), so neither counts without the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onp.config import VerdictConfig


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


def judge(
    target: int,
    advantage: float,
    concentration: float,
    repairability: float,
    config: VerdictConfig,
) -> Verdict:
    """Weigh the evidence; each piece is scaled to [0, 1] over the range where networks differ."""
    support = _ramp(concentration, *config.concentration)
    support = (support + _ramp(repairability, *config.repairability)) / 2
    score = _ramp(advantage, *config.advantage) * (1 + support) / 2
    found = score >= config.threshold and repairability > 0
    return Verdict(
        "backdoor" if found else "clean",
        score,
        target if found else None,
        concentration,
        repairability,
        advantage,
    )


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
