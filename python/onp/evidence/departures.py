"""Where each class's images go once squares lead them away."""

from __future__ import annotations

from dataclasses import replace

import torch

from onp.evidence.standing import DRAWS
from onp.probes.departure import images_of
from onp.scene import Scene
from onp.verdict import MANY_CLASSES, Verdict, by_departures

UNCONFIRMED = 0.5
"""Score, at most, of what a place says that more draws of it do not bear out."""


def from_departures(scene: Scene) -> tuple[Verdict, list[tuple[int, int]]]:
    """What squares that lead each class's images away say; a place that calls is looked at from two
    more starts, and the mean must call the same. And squares that stand for the trigger, by place
    and draw: three of that place for one class's images, or one of each of the three places where
    most images come to the class. Not asked where fewer than ten classes have images enough."""
    config = scene.config.verdict
    if len(images_of(scene.clean, scene.evaluator.trace.num_classes)) < MANY_CLASSES:
        reason = "score 0.00: too few classes have images enough to see where these go"
        return Verdict("clean", 0.0, None, "squares", {"advantage": 0.0}, reason), []
    found = scene.departures()
    verdict, place = by_departures(found, config)
    if verdict.target is None:
        return verdict, []
    more = [scene.departures([place], draw) for draw in DRAWS[1:]]
    first = found.gained[list(found.places).index(place)]
    mean = torch.stack([first, *(one.gained[0] for one in more)]).mean(0, keepdim=True)
    again, _ = by_departures(replace(more[0], gained=mean), config)
    if again.target != verdict.target:
        score = min(again.score, UNCONFIRMED)
        reason = f"score {score:.2f}: more draws do not bear out what squares led images to"
        again = replace(again, finding="clean", target=None, score=score, reason=reason)
    if isinstance(again.target, int):
        gathered = found.gained.mean(1)[:, again.target].topk(len(DRAWS)).indices.tolist()
        return again, [(found.places[row], 0) for row in gathered]
    return again, [(place, draw) for draw in DRAWS]
