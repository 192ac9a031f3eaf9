"""Is there a backdoor? Three pieces of evidence from clean data, averaged into a score.

- concentration: a backdoored network answers one class after unlearning, a clean one several;
- repairability: the success of its best probe can be pruned away at little cost in accuracy;
- advantage: that probe is smaller, or works better, than the same family's for another class.
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
            f"score {self.score:.2f}: unlearning leaves one class on "
            f"{100 * self.concentration:.0f}% of the images, the best probe's repair is worth "
            f"{self.repairability:.2f} of 1, its advantage over another class is "
            f"2^{self.advantage:.1f}"
        )


def judge(
    concentration: float,
    repairability: float,
    advantage: float,
    target: int,
    config: VerdictConfig,
) -> Verdict:
    """Weigh the evidence; each piece is scaled to [0, 1] over the range where networks differ."""
    parts = (
        _ramp(concentration, *config.concentration),
        _ramp(repairability, *config.repairability),
        _ramp(advantage, *config.advantage),
    )
    score = sum(parts) / len(parts)
    found = score >= config.threshold
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
