"""What was found, and what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from onp.probes.margin import Margins
from onp.probes.race import Contender
from onp.scene import Squares
from onp.verdict import Verdict


@dataclass(frozen=True)
class Unlearning:
    """What it left of the network, and where it changed it."""

    answers: Tensor
    """How many clean images got each answer, int64 [K]."""
    response: Tensor
    """Of every site, float32 [S]."""


@dataclass(frozen=True)
class Evidence:
    """A verdict and what it rests on."""

    verdict: Verdict
    contenders: list[Contender]
    """Of all probes."""
    counted: list[Contender]
    """Those that stand for the trigger in the search; none without a backdoor."""
    statistics: Verdict | None = None
    """What the norm statistics alone say, where they were asked."""
    looked: Sequence[Contender] = ()
    """The triggers that every class was looked at by, where that was asked."""
    squares: Squares | None = None
    """What squares reach, where they were asked."""
    margins: Margins | None = None
    """How far margins can be driven, where they were asked as nothing else called a backdoor."""
    unlearning: Unlearning | None = None
    """Where there are too many classes to look at them all."""
