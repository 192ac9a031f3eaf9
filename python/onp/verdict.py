"""Is there a backdoor? Four independent findings from clean data; any one of them calls it.

**Norm statistics.** The moments that the batch norms remember differ from the clean images' by more
than chance, and triggers that are learned to explain the difference, no class being asked for, make
the network answer one class:

    score = mean of the excess and of the share of images that go to that class, each scaled,
            less the larger a patch has to be for what it explains of that excess

The share is a mean over all triggers, 0 for those that answer another class; where images come to
two or three classes, that of these together. What noise makes of
the moments takes a large trigger to explain, an attacker's a small one.

If no one class: a trigger that shifts all labels by one and explains the difference (all-to-all),
against one that shifts them by two; then the lesser of its share and its advantage counts.

**Probes.** Triggers of three families are synthesised for every class, in a few steps. One that
matches no attack finds a natural adversarial direction, and every class has some; so a backdoor is
called where the best trigger that works on half of the images leads the same family's for every
other class: it is smaller, or works better. More steps tell less, as natural directions catch up.

    score = that lead, scaled

**Squares.** The same lead among opaque squares of one place, that of the image where it is
largest: what a few steps of them reach there for other classes says how far a natural direction
leads (``onp.probes.square``). Where one draw speaks for a class, the mean of three decides. And
squares that shift all labels by one, against those that shift them by two (all-to-all): natural
directions lead to a class, and shift those of one label at most. And squares that lead each class's
images away: where those of most come to the same class, or those of one class to another where no
other's leave (a trigger may work on one class alone).

**Margins.** How sure of each class the network can be made, by any image at all, leads that of all
other classes, in logits and as a multiple of how sure it is of the class's clean images
(``onp.probes.margin``).

Where classes are few, one leads by chance: more is asked then. What unlearning leaves, and whether
a trigger's success can be pruned away, tell next to nothing beside a lead (bench/NOTES.md, "A lead
over near classes").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onp.agent.contenders import advantage, leading
from onp.agent.race import Contender
from onp.config import VerdictConfig
from onp.probes.departure import Departures
from onp.probes.margin import Margins
from onp.probes.patch import Patch
from onp.probes.probe import LabelShift, OneClass, Target, classes_of
from onp.probes.replay import Replayed

Ground = Literal["norm statistics", "squares", "probes", "margins"]
"""What a verdict rests on."""
EFFORT_IMAGES = 500
"""Clean images in whose chance an effort counts the excess: with fewer, chance is larger."""
LEAST_AGREEMENT = 0.1
"""A trigger that agrees less with the norms' shift explains as much of it as this."""
LEAST_MARGIN = 0.1
"""Margins below this, in logits, count as this."""
LEAST_CLASSES = 3
"""With fewer, neither margins nor probes lead,"""
LEAST_LOOKED_AT = 5
"""and with fewer than these probes call no backdoor: one of three classes is nearer than the others
by up to 2^3.9."""
MANY_CLASSES = 10
"""With fewer, all of them must show more."""
MOST = 0.5
"""Share of the images that come to the classes of several triggers together, at least."""
FURTHER = 2
"""Classes, at most, that norms name beside the first."""
LEAST_CONTROL = 0.1
"""Labels shifted by two for fewer of the images than this: as good as this many."""


@dataclass(frozen=True)
class Verdict:
    finding: Literal["backdoor", "clean"]
    score: float
    """In [0, 1]; at or above the threshold it is a backdoor."""
    target: Target | None
    """What the backdoor answers, where one was found."""
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


def beyond_doubt(verdict: Verdict, config: VerdictConfig) -> bool:
    """Whether looks or squares call a class beside another one: near such a one a natural direction
    leads further than it would in a clean network."""
    if verdict.target is None or verdict.by not in ("probes", "squares"):
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
    score = (_ramp(excess, *config.excess) + _ramp(share, *config.share)) / 2
    score *= 1.0 - _ramp(effort, *config.effort)
    alike = [one.agreement for one in own]
    return _verdict(
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


def by_label_shift(
    excess: float, shifted: Replayed, control: Replayed, config: VerdictConfig
) -> Verdict:
    """Judge triggers that replay the shift and move labels by one (``shifted``) and by two."""
    stronger = _shifts_more(shifted.share, control.share)
    support = min(_ramp(stronger, *config.shift), _ramp(shifted.share, *config.share))
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


def by_probes(looked: Sequence[Contender], config: VerdictConfig, called: bool = False) -> Verdict:
    """Judge triggers of a few steps for every class by the largest lead of one that works over its
    family's for all others. Of a few classes, one is nearer by nature: more is asked, but where the
    norms have ``called`` a backdoor, whose class is all that is in question then."""
    best, classes = leading(looked, config.least_success), {one.probe.target for one in looked}
    if best is None or len(classes) < (LEAST_CLASSES if called else LEAST_LOOKED_AT):
        reason = f"no probe works on {100 * config.least_success:.0f}% of the images"
        if best is not None:
            reason = f"of {len(classes)} classes one is nearer by nature: probes say nothing"
        return _verdict(0.0, None, "probes", {"advantage": 0.0, "success": 0.0}, reason, config)
    lead = advantage(best, looked)
    few = 1.0 if called else 1.0 + config.lead_few * max(0, MANY_CLASSES - len(classes))
    return _verdict(
        _ramp(lead, 0.0, few * config.lead),
        best.probe.target,
        "probes",
        {"advantage": lead, "success": best.success},
        f"a few steps of a trigger ({best.probe.family.name}, for class {best.probe.target}) are "
        f"2^{lead:.1f} times as strong as its family's for any other class, and work on "
        f"{100 * best.success:.0f}% of the images",
        config,
    )


def by_squares(
    successes: Tensor,
    targets: Sequence[int],
    config: VerdictConfig,
    bounds: tuple[float, float] | None = None,
    share: float | None = None,
) -> tuple[Verdict, int]:
    """Judge squares by what they reach, float32 [places, classes], for the classes ``targets``: by
    the largest lead over the other classes in one place of one that works, on the more images the
    fewer classes there are. And that place. With fewer than five no lead is enough: rivals count
    ``square_floor`` at least. bounds: leads that count nothing and all; share: of the images that
    one must work on; default: the squares'."""
    least = config.least_success if share is None else share
    least += config.square_few * max(0, MANY_CLASSES - len(targets))
    best, whose = successes.max(1)
    rivals = successes.scatter(1, whose[:, None], 0.0).max(1).values
    leads = (best / rivals.clamp_min(config.square_floor)).clamp_min(1.0).log2()
    works = best >= least
    place = int(torch.where(works, leads, best - 1.0).argmax())  # the best of them, if none works
    lead, success = float(leads[place] * works[place]), float(best[place])
    target = targets[int(whose[place])]
    reason = (
        f"an opaque square for class {target} in place {place} works on {100 * success:.0f}% of "
        f"the images, 2^{lead:.1f} times as many as one in the same place for any other class"
    )
    if not works[place]:
        reason = f"no square works on {100 * least:.0f}% of the images"
    few = 1.0 + config.scarcity * max(0, config.rivals - (len(targets) - 1))
    low, high = config.square_lead if bounds is None else bounds
    score = _ramp(lead, few * low, few * high)
    found = {"advantage": lead, "success": success, "place": float(place)}
    return _verdict(score, target, "squares", found, reason, config), place


def by_departures(found: Departures, config: VerdictConfig) -> tuple[Verdict, int]:
    """Judge squares that lead each class's images away. They call the class that those of all
    classes come to in one place, as a mean over the classes, if that leads what comes to any other;
    or one that the images of a single class come to, if squares work better for it than for any
    other class there. The surer of the two, and the place."""
    means = found.gained.mean(1)
    to_one, row = by_squares(
        means, range(means.shape[1]), config, config.gathered_lead, config.gathered
    )
    gained, answers = found.gained.max(2)
    alone, own_row = by_squares(gained, found.sources, config, config.departure_lead)
    target: Target = int(means[row].argmax())
    said, of = to_one, "all classes' images, each class's led away"
    if alone.score > to_one.score:
        said, row, column = alone, own_row, int(gained[own_row].argmax())
        target = OneClass(found.sources[column], int(answers[row, column]))
        of = f"the images of class {target.source}"
    place, evidence = found.places[row], said.evidence
    reason = (
        f"opaque squares in place {place} make class {classes_of(target)[0]} of "
        f"{100 * evidence['success']:.0f}% of {of}, 2^{evidence['advantage']:.1f} times as many as "
        "comes next in that place"
    )
    return replace(
        said,
        target=None if said.target is None else target,
        evidence={**evidence, "place": float(place)},
        reason=f"score {said.score:.2f}: {reason}",
    ), place


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
    score = _ramp(lead, *(few * bound for bound in config.margin_lead))
    reason = (
        f"the network can be made surer of class {margins.classes[first]} than of any other, "
        f"2^{lead:.1f} times as far as of the next, in logits and over what its images bring"
    )
    if lead == 0.0:
        reason = "no class is one that the network can be made surer of than of all others"
    found = {"advantage": lead, "margin": float(margins.driven[first])}
    return _verdict(score, margins.classes[first], "margins", found, reason, config)


def _lead(values: Tensor) -> float:
    """Binary logarithm of the largest over the second largest."""
    first, second = values.topk(2).values.tolist()
    return math.log2(first / max(second, 1e-9))


def by_shifting_squares(
    successes: Tensor, shift: LabelShift, present: int, config: VerdictConfig
) -> tuple[Verdict, int]:
    """Judge squares by what they reach for a shift of labels by one and by two, float32
    [places, 2], on images of ``present`` classes: by the one whose success and whose advantage over
    the second shift in its place are best together, and that place. A square that leads all images
    to one class shifts those of one by chance: their share is taken off."""
    gained = (successes - 1.0 / present).tolist()
    scores = [
        min(_ramp(_shifts_more(one, two), *config.shift), _ramp(one, *config.square_shift))
        for one, two in gained
    ]
    place = max(range(len(scores)), key=lambda at: (scores[at], gained[at][0]))
    success, control = successes[place].tolist()
    reason = (
        f"an opaque square in place {place} turns {100 * success:.0f}% of the images into the next "
        f"class, and one in the same place {100 * control:.0f}% into the one after it"
    )
    found = {
        "advantage": _shifts_more(*gained[place]),
        "success": success,
        "place": float(place),
    }
    return _verdict(scores[place], shift, "squares", found, reason, config), place


def _shifts_more(by_one: float, by_two: float) -> float:
    """Binary logarithm of how many more images have their label shifted by one than by two."""
    return math.log2(max(by_one, 1e-2) / max(by_two, LEAST_CONTROL))


def _verdict(
    score: float,
    target: Target | None,
    by: Ground,
    evidence: dict[str, float],
    reason: str,
    config: VerdictConfig,
    also: tuple[int, ...] = (),
) -> Verdict:
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


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
