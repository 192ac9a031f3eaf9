"""The search: from the best mask so far, moves that promise most are evaluated, round by round.

One backward pass tells the effects of all flips of the best mask. Moves are of two kinds: the flips
that the policy values most, each alone, and one set of flips that grows by what adds most in the
model of the margins, where flips that undo one another are seen to. All are evaluated in one call
of the native engine, the policy learns what the single ones brought, and those that do harm are not
tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.agent.cost import Cost
from onp.agent.effects import flip_effects
from onp.agent.elite import Elite
from onp.agent.learner import Learner
from onp.agent.policy import State
from onp.config import AgentConfig


@dataclass(frozen=True)
class Round:
    """One round of ``improve``."""

    tried: int
    """Moves evaluated: flips alone, and sets of them."""
    better: int
    """Of these, how many raised the worth."""
    gain: float
    """Mean reward: change of the worth by a flip alone."""
    loss: float
    """Of the values against the gains, before the policy learned from them."""
    worth: float
    """Of the best mask after the round."""


def improve(
    elite: Elite,
    cost: Cost,
    learner: Learner | None,
    config: AgentConfig,
    report: Callable[[int, Round], None] = lambda number, log: None,
) -> list[Round]:
    """Improve the best mask in ``elite`` (not empty) until two rounds in a row find nothing.

    The worths in ``elite`` must be those of ``cost``. Without a learner the flips are valued by
    what the model of the margins foresees.
    """
    rounds: list[Round] = []
    harmful = torch.zeros(cost.sites, dtype=torch.bool)
    for number in range(config.rounds):
        if bool(harmful.all()):
            break
        mask, best = elite.best, elite.worths[0]
        effects = flip_effects(cost, mask)
        state = State.of(mask, effects)
        values = state.foreseen if learner is None else learner.values(state)
        values = values.masked_fill(harmful, -torch.inf)
        open_to = values.argsort(descending=True, stable=True)[: int((~harmful).sum())]
        sites = open_to[: config.tried]
        together = torch.tensor(
            effects.grown(open_to[: config.pool], config.grown), dtype=torch.int64
        )
        moves = torch.cat([flipped(mask, sites.split(1)), flipped(mask, heads(together))])
        gains = cost.worth(moves) - best
        elite.offer(moves, gains + best)
        alone = gains[: len(sites)]
        loss = 0.0 if learner is None else learner.learn(state, sites, alone)
        harmful[sites[alone < -config.harm]] = True
        better, mean = int((gains > 0).sum()), float(alone.mean()) if len(alone) else 0.0
        rounds.append(Round(len(moves), better, mean, loss, elite.worths[0]))
        report(number, rounds[-1])
        if len(rounds) > 1 and all(log.better == 0 for log in rounds[-2:]):
            break
    return rounds


def give_back(mask: Tensor, cost: Cost, rounds: int) -> Tensor:
    """Open again what need not be pruned by ``cost``, of images the search has not seen: what it
    pruned by their chance. mask bool [S]; returns one that is worth as much or more."""
    best = float(cost.worth(mask[None]))
    for _ in range(rounds):
        order = flip_effects(cost, mask).grown(mask.nonzero().squeeze(1), int(mask.sum()))
        sizes = sorted({len(order) * share // 8 for share in range(1, 9)} - {0})
        if not sizes:
            break
        opened = flipped(mask, [torch.tensor(order[:size]) for size in sizes])
        worths = cost.worth(opened)
        if float(worths.max()) <= best:
            break
        mask, best = opened[int(worths.argmax())], float(worths.max())
    return mask


def heads(sites: Tensor) -> list[Tensor]:
    """The first two of ``sites`` int64 [n], the first three, ..., all of them."""
    return [sites[:size] for size in range(2, len(sites) + 1)]


def flipped(mask: Tensor, moves: Sequence[Tensor]) -> Tensor:
    """``mask`` bool [S] with the sites of each move int64 [n] flipped, bool [len(moves), S]."""
    masks = mask.repeat(len(moves), 1)
    for row, sites in zip(masks, moves, strict=True):
        row[sites] ^= True
    return masks
