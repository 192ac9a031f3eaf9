"""What opaque squares say: for a class, for a shift of labels, and by where they lead images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onp.config import VerdictConfig
from onp.probes.departure import Departures
from onp.probes.probe import LabelShift, OneClass, Target, classes_of
from onp.verdict.finding import MANY_CLASSES, Verdict, judged, ramp, shifts_more


def by_squares(
    successes: Tensor,
    targets: Sequence[int],
    config: VerdictConfig,
    bounds: tuple[float, float] | None = None,
    share: float | None = None,
    first: int | None = None,
) -> tuple[Verdict, int]:
    """Judge squares by what they reach, float32 [places, classes], for the classes ``targets``: by
    the largest lead over the other classes in one place of one that works, on the more images the
    fewer classes there are. And that place. With fewer than five no lead is enough: rivals count
    ``square_floor`` at least. bounds: leads that count nothing and all; share: of the images that
    one must work on; default: the squares'. first: the one class that is judged; default: any."""
    least = config.least_success if share is None else share
    least += config.square_few * max(0, MANY_CLASSES - len(targets))
    best, whose = successes.max(1)
    rivals = successes.scatter(1, whose[:, None], 0.0).max(1).values
    leads = (best / rivals.clamp_min(config.square_floor)).clamp_min(1.0).log2()
    works = best >= least
    if first is not None:
        works &= whose == list(targets).index(first)
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
    score = ramp(lead, few * low, few * high)
    found = {"advantage": lead, "success": success, "place": float(place)}
    return judged(score, target, "squares", found, reason, config), place


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


def by_shifting_squares(
    successes: Tensor, shift: LabelShift, present: int, config: VerdictConfig
) -> tuple[Verdict, int]:
    """Judge squares by what they reach for a shift of labels by one and by two, float32
    [places, 2], on images of ``present`` classes: by the one whose success and whose advantage over
    the second shift in its place are best together, and that place. A square that leads all images
    to one class shifts those of one by chance: their share is taken off."""
    gained = (successes - 1.0 / present).tolist()
    scores = [
        min(ramp(shifts_more(one, two), *config.shift), ramp(one, *config.square_shift))
        for one, two in gained
    ]
    place = max(range(len(scores)), key=lambda at: (scores[at], gained[at][0]))
    success, control = successes[place].tolist()
    reason = (
        f"an opaque square in place {place} turns {100 * success:.0f}% of the images into the next "
        f"class, and one in the same place {100 * control:.0f}% into the one after it"
    )
    found = {
        "advantage": shifts_more(*gained[place]),
        "success": success,
        "place": float(place),
    }
    return judged(scores[place], shift, "squares", found, reason, config), place
