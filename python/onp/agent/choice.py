"""The final mask, chosen by clean data.

Finalists are compared on all clean images, by the cost alone: what they prune has no price here.
"""

from __future__ import annotations

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


def choose(finalists: Sequence[Tensor], cost: Cost) -> Choice:
    """The cheapest of the finalists (masks bool [S]) and of pruning nothing."""
    masks = torch.stack([torch.zeros_like(finalists[0]), *finalists])
    parts = cost.parts(masks)
    costs, parts = cost.each(parts).cpu(), parts.cpu()  # [M, N]
    best = int(costs.mean(1).argmin())
    halves = halved(cost.hands, costs.shape[1])
    fitted = torch.empty(costs.shape[1])
    for half in (halves, ~halves):
        fitted[~half] = costs[int(costs[:, half].mean(1).argmin())][~half]
    mean, error = float(fitted.mean()), float(fitted.std() / len(fitted) ** 0.5)
    interval = (mean - 1.96 * error, mean + 1.96 * error)
    successes = [parts.success[:, hand].sum(1) / max(len(hand), 1) for hand in cost.hands]
    return Choice(
        masks[best],
        float(costs[best].mean()),
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
