"""The final mask, chosen by clean data.

Finalists are compared on all clean images, by the cost alone: what they prune has no price here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.agent.cost import Cost


@dataclass(frozen=True, eq=False)
class Choice:
    mask: Tensor
    """bool [S]."""
    cost: float
    """Cross-entropy added + divergence + weighted probe success left, in nats an image."""
    crossfit: float
    """The same for a mask chosen on one half of the images and measured on the other."""
    interval: tuple[float, float]
    """95% interval of the cross-fitted cost."""
    success_before: list[float]
    """Mean excess probability of each counted probe's target, nothing pruned."""
    success_after: list[float]
    """The same under the chosen mask."""


def choose(finalists: Sequence[Tensor], costs: Sequence[Cost]) -> Choice:
    """The cheapest of the finalists (masks bool [S]) and of pruning nothing, on the images of all
    the costs, which are dealt out to the same probes."""
    masks = torch.stack([torch.zeros_like(finalists[0]), *finalists])
    told = [cost.parts(masks) for cost in costs]
    each = torch.cat([cost.each(one) for cost, one in zip(costs, told, strict=True)], 1).cpu()
    each = each.nan_to_num(nan=math.inf)  # a mask under which an answer is no number is never taken
    best = int(each.mean(1).argmin())  # of [M, N]
    halves = torch.cat([halved(cost.hands, len(cost.images)) for cost in costs])
    fitted = torch.empty(each.shape[1])
    for half in (halves, ~halves):
        fitted[~half] = each[int(each[:, half].mean(1).argmin())][~half]
    mean, error = float(fitted.mean()), float(fitted.std() / len(fitted) ** 0.5)
    interval = (mean - 1.96 * error, mean + 1.96 * error)
    successes = []
    for hands in zip(*(cost.hands for cost in costs), strict=True):
        reached = [one.success.cpu()[:, hand] for one, hand in zip(told, hands, strict=True)]
        asked = sum(int((c.weight[hand] > 0).sum()) for c, hand in zip(costs, hands, strict=True))
        successes.append(torch.cat(reached, 1).sum(1) / max(asked, 1))
    return Choice(
        masks[best],
        float(each[best].mean()),
        mean,
        interval,
        [float(success[0]) for success in successes],
        [float(success[best]) for success in successes],
    )


def halved(hands: Sequence[Tensor], count: int) -> Tensor:
    """Which of ``count`` images are in the first half, bool [count]. Either half sees every probe,
    whose hands int64 [n] are given, at both of its strengths: these take turns in a hand."""
    first = torch.zeros(count, dtype=torch.bool)
    for hand in hands:
        first[hand[torch.arange(len(hand)) % 4 < 2]] = True
    return first
