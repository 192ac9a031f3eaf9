"""Is there a backdoor? Two independent findings from clean data; either one calls it.

**Norm statistics.** The moments that the batch norms remember differ from the clean images' by more
than chance, and triggers that are learned to explain the difference, no class being asked for, make
the network answer one class:

    score = mean of the excess and of the share of images that go to that class, each scaled

The share is a mean over all triggers, 0 for those that answer another class.

If no one class: a trigger that shifts all labels by one and explains the difference (all-to-all),
against one that shifts them by two; then the lesser of its share and its advantage counts.

**Probes.** Triggers synthesised per class and family:

- advantage: the best probe is smaller, or works better, than the same family's for other classes;
- concentration: after unlearning the network answers that probe's class (not asked where there are
  no batch norms: what is left then is often an arbitrary class);
- repairability: the success of that probe can be pruned away at little cost in accuracy;
- second: another family's probe has an advantage for the same class too, or the first look has one
  over every class, as a backdoor's class is near for whatever resembles its trigger, however widely
  the network has spread it.

    score = advantage * (1 + mean(concentration, max(repairability, second))) / 2

without concentration where that is not asked, and 0 where pruning brings no gain at all. A clean
network can show these (unlearning may leave any one class, and some natural adversarial direction
is cheap to prune), so none counts without the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onp.agent.contenders import advantage
from onp.agent.race import Contender
from onp.config import VerdictConfig
from onp.probes.probe import Target
from onp.probes.replay import Replayed
from onp.probes.unlearning import Unlearned

LEAST_CONTROL = 0.1
"""Labels shifted by two for fewer of the unseen images than this: as good as this many."""


@dataclass(frozen=True)
class Verdict:
    finding: Literal["backdoor", "clean"]
    score: float
    """In [0, 1]; at or above the threshold it is a backdoor."""
    target: Target | None
    """What the backdoor answers, where one was found."""
    by: Literal["norm statistics", "probes"]
    evidence: dict[str, float]
    """The pieces of evidence by name, as measured."""
    reason: str
    """One sentence for people."""


def target_of(replayed: Sequence[Replayed]) -> Target:
    """What the replayed triggers answer: each speaks with the share of images that it moves, as far
    as it agrees with the shift."""
    said: dict[Target, float] = {}
    for one in replayed:
        voice = one.share * max(one.agreement, 0.0)
        said[one.probe.target] = said.get(one.probe.target, 0.0) + voice
    return max(said, key=lambda target: said[target])


def by_statistics(excess: float, replayed: Sequence[Replayed], config: VerdictConfig) -> Verdict:
    """Judge the norms' shift (``NormShift.excess``) and the triggers that replay it."""
    target = target_of(replayed)
    share = sum(r.share for r in replayed if r.probe.target == target) / len(replayed)
    score = (_ramp(excess, *config.excess) + _ramp(share, *config.share)) / 2
    alike = [one.agreement for one in replayed if one.probe.target == target]
    return _verdict(
        score,
        target,
        "norm statistics",
        {"excess": excess, "share": share, "agreement": sum(alike) / len(alike)},
        f"the batch norms' moments are {excess:.1f} times as far from the clean images' as chance "
        f"has it, and {len(replayed)} triggers that explain it move {100 * share:.0f}% of the "
        f"images to class {target} on average",
        config,
    )


def by_label_shift(
    excess: float, shifted: Replayed, control: Replayed, config: VerdictConfig
) -> Verdict:
    """Judge triggers that replay the shift and move labels by one (``shifted``) and by two."""
    stronger = math.log2(max(shifted.share, 1e-2) / max(control.share, LEAST_CONTROL))
    support = min(_ramp(stronger, *config.advantage), _ramp(shifted.share, *config.share))
    score = (_ramp(excess, *config.excess) + support) / 2
    return _verdict(
        score,
        shifted.probe.target,
        "norm statistics",
        {"excess": excess, "share": shifted.share, "advantage": stronger},
        f"the batch norms' moments are {excess:.1f} times as far from the clean images' as chance "
        f"has it, and a trigger that explains it turns {100 * shifted.share:.0f}% of unseen images "
        f"into the next class (into the one after it: {100 * control.share:.0f}%)",
        config,
    )


def may_be_called(contenders: Sequence[Contender], config: VerdictConfig) -> bool:
    """Whether the advantage of any of them, which bounds its score, reaches the threshold: where
    not, nothing that a race may find makes it a backdoor."""
    leads = [_ramp(advantage(one, contenders), *config.advantage) for one in contenders]
    return max(leads, default=0.0) >= config.threshold


def by_probes(
    contenders: Sequence[Contender],
    looked: Sequence[Contender],
    unlearned: Unlearned,
    config: VerdictConfig,
) -> Verdict:
    """The verdict of the probe with the strongest evidence. looked: those of a first look at every
    class."""
    verdicts = []
    for contender in contenders:
        target = contender.probe.target
        assert isinstance(target, int)  # synthesis knows no label shifts
        verdicts.append(
            judge(
                target,
                advantage(contender, contenders),
                unlearned.share(target) if unlearned.held else None,
                contender.score if contender.size > 0 else None,
                second(contender, contenders, looked, config.least_success),
                config,
            )
        )
    return max(verdicts, key=lambda verdict: verdict.score)


def second(
    contender: Contender,
    contenders: Sequence[Contender],
    looked: Sequence[Contender],
    least_success: float,
) -> float:
    """The largest advantage for the contender's class of another family's probe, or of the first
    look's, which was had over every class, that works on so many images; 0 where there is none."""
    others = [one for one in contenders if one.probe.family.name != contender.probe.family.name]
    leads = [
        advantage(one, those)
        for those in (others, looked)
        for one in those
        if one.probe.target == contender.probe.target and one.success >= least_success
    ]
    return max(leads, default=0.0)


def judge(
    target: int,
    strength_ratio: float,
    concentration: float | None,
    repairability: float | None,
    seconded: float,
    config: VerdictConfig,
) -> Verdict:
    """Judge one probe's evidence, each piece scaled to [0, 1] over the range where networks differ.

    strength_ratio: the probe's advantage, a binary logarithm. concentration: None where unlearning
    says nothing; the others support alone then. repairability: None for a probe that
    was not raced; it, or one whose success no mask can remove at a gain, is no evidence at all.
    seconded: the advantage for the class of another family or of the first look.
    """
    repair = "was not looked for" if repairability is None else f"is worth {repairability:.2f} of 1"
    worth = 0.0 if repairability is None else repairability
    support = max(_ramp(worth, *config.repairability), _ramp(seconded, *config.advantage))
    left = "says nothing without batch norms"
    if concentration is not None:
        support = (support + _ramp(concentration, *config.concentration)) / 2
        left = f"leaves the best probe's class on {100 * concentration:.0f}% of the images"
    score = _ramp(strength_ratio, *config.advantage) * (1 + support) / 2
    if worth <= 0:
        score = 0.0
    return _verdict(
        score,
        target,
        "probes",
        {
            **({} if concentration is None else {"concentration": concentration}),
            "repairability": worth,
            "advantage": strength_ratio,
            "seconded": seconded,
        },
        f"unlearning {left}, the best probe's repair {repair}, its advantage over other classes is "
        f"2^{strength_ratio:.1f}, another look's 2^{seconded:.1f}",
        config,
    )


def _verdict(
    score: float,
    target: Target,
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
