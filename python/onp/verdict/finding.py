"""What a test says: a backdoor or not, of which class, how surely and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onp.config import VerdictConfig
from onp.probes.probe import Target

Ground = Literal["norm statistics", "squares", "looks", "margins"]
"""What a verdict rests on."""
Finding = Literal["backdoor", "clean", "suspected"]
"""The last: clean by the evidence, but repaired as somebody named a class."""
MANY_CLASSES = 10
"""With fewer, all of them must show more."""
LEAST_CLASSES = 3
"""With fewer, neither margins nor looks lead,"""
LEAST_CONTROL = 0.1
"""Labels shifted by two for fewer of the images than this: as good as this many."""


@dataclass(frozen=True)
class Verdict:
    finding: Finding
    score: float
    """In [0, 1]; at or above the threshold it is a backdoor."""
    target: Target | None
    """What the backdoor answers, where one was found or is suspected."""
    by: Ground
    evidence: dict[str, float]
    """The pieces of evidence by name, as measured."""
    reason: str
    """One sentence for people."""
    also: tuple[int, ...] = ()
    """Further classes, which it answers to triggers of their own."""

    @property
    def targets(self) -> list[Target]:
        """All that it answers."""
        return [] if self.target is None else [self.target, *self.also]

    @property
    def by_norms(self) -> bool:
        """Whether norm statistics call a backdoor: then triggers that explain them stand for the
        attacker's."""
        return self.by == "norm statistics" and self.finding == "backdoor"


def beyond_doubt(verdict: Verdict, config: VerdictConfig) -> bool:
    """Whether looks or squares call a class beside another one: near such a one a natural direction
    leads further than it would in a clean network."""
    if verdict.target is None or verdict.by not in ("looks", "squares"):
        return False
    lead, success = (verdict.evidence.get(name, 0.0) for name in ("advantage", "success"))
    return (
        lead >= config.further_lead[verdict.by == "squares"] and success >= config.further_success
    )


def as_sure(verdict: Verdict, other: Verdict) -> Verdict:
    """The verdict with the other's score, which calls the same class, if that is surer."""
    if other.score <= verdict.score:
        return verdict
    reason = f"score {other.score:.2f}: {verdict.reason.partition(': ')[2]}"
    return replace(verdict, score=other.score, reason=reason)


def also_called(verdict: Verdict, others: Sequence[Verdict]) -> Verdict:
    """The verdict, and the classes that others call beside its own."""
    further = (one for other in others for one in other.targets if isinstance(one, int))
    also = tuple(one for one in dict.fromkeys([*verdict.also, *further]) if one != verdict.target)
    new = (one for one in others if set(one.targets) - set(verdict.targets))
    reasons = "".join(f"; {one.reason.partition(': ')[2]}" for one in new)
    return replace(verdict, also=also, reason=verdict.reason + reasons)


def named(verdict: Verdict, target: int) -> Verdict:
    """The verdict, and the class that somebody suspects, which it does not call."""
    why = f"class {target} was named as suspect"
    if verdict.target is not None:
        return replace(verdict, also=(*verdict.also, target), reason=f"{verdict.reason}; {why}")
    reason = f"{verdict.reason}; nothing is called, but {why}"
    return replace(verdict, finding="suspected", target=target, reason=reason)


def judged(
    score: float,
    target: Target | None,
    by: Ground,
    evidence: dict[str, float],
    reason: str,
    config: VerdictConfig,
    also: tuple[int, ...] = (),
) -> Verdict:
    """The verdict of a score: a backdoor, and a target, from the threshold on."""
    found = score >= config.threshold
    return Verdict(
        "backdoor" if found else "clean",
        score,
        target if found else None,
        by,
        evidence,
        f"score {score:.2f}: {reason}",
        also if found else (),
    )


def ramp(value: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high`` on, linear between them."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def shifts_more(by_one: float, by_two: float) -> float:
    """Binary logarithm of how many more images have their label shifted by one than by two."""
    return math.log2(max(by_one, 1e-2) / max(by_two, LEAST_CONTROL))
