"""Improve a mask flip by flip: the gradient says which flips may help, the engine which do.

One backward pass gives the first-order effect of flipping every site (``Cost.flip_effects``),
at the price of two masks. It is wrong about flips whose effect is large: pruning a channel that
all classes need looks as good as pruning one that the trigger needs. So the most promising are
evaluated one by one, those that do harm are not tried again, and of those that help ever longer
chains are evaluated together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.agent.cost import Cost
from onp.agent.elite import Elite
from onp.config import FlipConfig


@dataclass(frozen=True)
class FlipRound:
    """One round of ``improve``."""

    tried: int
    """Flips evaluated alone."""
    better: int
    """Of these, how many raised the worth."""
    worth: float
    """Of the best mask after the round."""


def improve(
    elite: Elite,
    cost: Cost,
    config: FlipConfig,
    report: Callable[[int, FlipRound], None] = lambda number, log: None,
) -> list[FlipRound]:
    """Improve the best mask in ``elite`` (not empty) until two rounds in a row find nothing.

    The worths in ``elite`` must be those of ``cost``.
    """
    rounds: list[FlipRound] = []
    harmful = torch.zeros(cost.sites, dtype=torch.bool)
    for number in range(config.rounds):
        mask, best = elite.best, elite.worths[0]
        promise = cost.flip_effects(mask).masked_fill(harmful, -torch.inf)
        order = promise.argsort(descending=True, stable=True)
        sites = order[: min(config.tried, int((~harmful).sum()))]
        singles = mask.expand(len(sites), -1).clone()
        singles[torch.arange(len(sites)), sites] ^= True
        worths = cost.worth(singles)
        elite.offer(singles, worths)
        harmful[sites[worths < best - config.harm]] = True
        by_worth = worths.argsort(descending=True, stable=True)
        better = sites[by_worth[worths[by_worth] > best]]
        if len(better) > 1:
            chains = chained(mask, better[: config.chained])
            elite.offer(chains, cost.worth(chains))
        rounds.append(FlipRound(len(sites), len(better), elite.worths[0]))
        report(number, rounds[-1])
        if all(log.better == 0 for log in rounds[-2:]) and len(rounds) > 1:
            break
    return rounds


def chained(mask: Tensor, sites: Tensor) -> Tensor:
    """``mask`` bool [S] with the first two of ``sites`` flipped, the first three, ..., bool
    [len(sites) - 1, S]."""
    chains = []
    flipped = mask.clone()
    for site in sites.tolist():
        flipped = flipped.clone()
        flipped[site] ^= True
        chains.append(flipped)
    return torch.stack(chains[1:])
