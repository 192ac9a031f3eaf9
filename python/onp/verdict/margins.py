"""What the largest margins of the classes say."""

from __future__ import annotations

import math

from torch import Tensor

from onp.config import VerdictConfig
from onp.probes.margin import Margins
from onp.verdict.finding import LEAST_CLASSES, MANY_CLASSES, Verdict, judged, ramp

LEAST_MARGIN = 0.1
"""Margins below this, in logits, count as this."""


def by_margins(margins: Margins, config: VerdictConfig) -> Verdict:
    """Judge the largest margins by how far one class's leads that of every other: in logits and as
    a multiple of the class's natural margin, whichever is less. A class leads that leads in both;
    some do in one by nature. Of two classes none does: one's margin is the other's reversed."""
    driven = margins.driven.clamp_min(LEAST_MARGIN)
    stretched = driven / margins.natural.clamp_min(LEAST_MARGIN)
    first, lead = int(driven.argmax()), 0.0
    known = int(margins.natural.isfinite().sum())  # the others are rivals in logits alone
    if known >= LEAST_CLASSES and first == int(stretched.argmax()):
        lead = min(_lead(driven), _lead(stretched))
    few = 1.0 + config.margin_few * max(0, MANY_CLASSES - known)
    score = ramp(lead, *(few * bound for bound in config.margin_lead))
    reason = (
        f"the network can be made surer of class {margins.classes[first]} than of any other, "
        f"2^{lead:.1f} times as far as of the next, in logits and over what its images bring"
    )
    if lead == 0.0:
        reason = "no class is one that the network can be made surer of than of all others"
    found = {"advantage": lead, "margin": float(margins.driven[first])}
    return judged(score, margins.classes[first], "margins", found, reason, config)


def _lead(values: Tensor) -> float:
    """Binary logarithm of the largest over the second largest."""
    first, second = values.topk(2).values.tolist()
    return math.log2(first / max(second, 1e-9))
