"""What a look at every class by a few steps of triggers says."""

from __future__ import annotations

from collections.abc import Sequence

from onp.config import VerdictConfig
from onp.probes.contenders import advantage, leading
from onp.probes.race import Contender
from onp.verdict.finding import LEAST_CLASSES, MANY_CLASSES, Verdict, judged, ramp

LEAST_LOOKED_AT = 5
"""and with fewer than these looks call no backdoor: one of three classes is nearer than the others
by up to 2^3.9."""


def by_looks(looked: Sequence[Contender], config: VerdictConfig, called: bool = False) -> Verdict:
    """Judge triggers of a few steps for every class by the largest lead of one that works over its
    family's for all others. Of a few classes, one is nearer by nature: more is asked, but where the
    norms have ``called`` a backdoor, whose class is all that is in question then."""
    best, classes = leading(looked, config.least_success), {one.probe.target for one in looked}
    if best is None or len(classes) < (LEAST_CLASSES if called else LEAST_LOOKED_AT):
        reason = f"no probe works on {100 * config.least_success:.0f}% of the images"
        if best is not None:
            reason = f"of {len(classes)} classes one is nearer by nature: looks say nothing"
        return judged(0.0, None, "looks", {"advantage": 0.0, "success": 0.0}, reason, config)
    lead = advantage(best, looked)
    few = 1.0 if called else 1.0 + config.lead_few * max(0, MANY_CLASSES - len(classes))
    return judged(
        ramp(lead, 0.0, few * config.lead),
        best.probe.target,
        "looks",
        {"advantage": lead, "success": best.success},
        f"a few steps of a trigger ({best.probe.family.name}, for class {best.probe.target}) are "
        f"2^{lead:.1f} times as strong as its family's for any other class, and work on "
        f"{100 * best.success:.0f}% of the images",
        config,
    )
