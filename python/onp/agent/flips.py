"""The search: from the best mask so far, moves that promise most are evaluated, round by round.

One backward pass tells the effects of all flips of the best mask, and the agent how far they are
to be trusted. Moves are of two kinds: the flips that promise most, each alone, and the heads of one
set of flips that grows by what adds most in the model of the margins, where flips that undo one
another are seen to. All are evaluated in one call of the native engine, and the agent learns from
what they brought. Flips that alone do harm are not tried again.
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
from onp.agent.state import State
from onp.config import AgentConfig


@dataclass(frozen=True)
class Round:
    """One round of ``improve``."""

    tried: int
    """Moves evaluated: flips alone, and sets of them."""
    better: int
    """Of these, how many raised the worth."""
    gain: float
    """Mean reward of the moves: change of the worth."""
    loss: float
    """Of what was foreseen against the gains, before the agent learned from them."""
    worth: float
    """Of the best mask after the round."""
    start: int = 0
    """Number of the start that it belongs to,"""
    draw: int = 0
    """and of the draw of images; worths of one draw are not those of another."""


def improve(
    elite: Elite,
    cost: Cost,
    learner: Learner | None,
    config: AgentConfig,
    report: Callable[[int, Round], None] = lambda number, log: None,
) -> list[Round]:
    """Improve the best mask in ``elite`` (not empty) until two rounds in a row find nothing.

    The worths in ``elite`` must be those of ``cost``. Without a learner the model of the margins is
    trusted as it is.
    """
    rounds: list[Round] = []
    present = None if learner is None else cost.parts(elite.best[None])
    harmful = torch.zeros(cost.sites, dtype=torch.bool)
    for number in range(config.rounds):
        if bool(harmful.all()):
            break
        mask, best = elite.best, elite.worths[0]
        state = State.of(mask, flip_effects(cost, mask))
        effects = state.effects.scaled(None if learner is None else learner.caution(state))
        values = effects.alone().cpu().masked_fill(harmful, -torch.inf)
        open_to = values.argsort(descending=True, stable=True)[: int((~harmful).sum())]
        alone = open_to[: config.tried].split(1)
        pool = open_to[: config.pool].to(cost.device)
        together = torch.tensor(effects.grown(pool, max(config.heads)), dtype=torch.int64)
        moves = [*alone, *heads(together, config.heads)]
        masks = flipped(mask, moves)
        parts = cost.parts(masks)
        gains = cost.worth(masks, parts).cpu() - best
        elite.offer(masks, gains + best)
        loss = 0.0
        if learner is not None and present is not None:
            loss = learner.learn(state, moves, parts.gains(present))
            if elite.worths[0] > best:
                present = parts.of(int(gains.argmax()))
        single = gains[: len(alone)]
        harmful[open_to[: config.tried][single < -config.harm]] = True
        better, mean = int((gains > 0).sum()), float(gains.mean()) if len(gains) else 0.0
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
        effects = flip_effects(cost, mask).scaled()
        pool = mask.nonzero().squeeze(1).to(cost.device)
        order = effects.grown(pool, len(pool))
        sizes = sorted({len(order) * share // 8 for share in (1, 2, 4, 6, 8)} - {0})
        if not sizes:
            break
        opened = flipped(mask, [torch.tensor(order[:size]) for size in sizes])
        worths = cost.worth(opened).cpu()
        if float(worths.max()) <= best:
            break
        mask, best = opened[int(worths.argmax())], float(worths.max())
    return mask


def heads(sites: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The first ``sizes`` of ``sites`` int64 [n], all of them once where there are fewer."""
    cuts = sorted({min(size, len(sites)) for size in sizes} - {0})
    return [sites[:size] for size in cuts]


def flipped(mask: Tensor, moves: Sequence[Tensor]) -> Tensor:
    """``mask`` bool [S] with the sites of each move int64 [n] flipped, bool [len(moves), S]."""
    masks = mask.repeat(len(moves), 1)
    for row, sites in zip(masks, moves, strict=True):
        row[sites] ^= True
    return masks
