"""The search: from the best mask so far, one set of flips a round that promises most.

One backward pass tells the effects of all flips of the best mask, and in that model of the margins
a set grows by what adds most to it, where flips that undo one another are seen to. The native
engine says what the set really brings; while sets help, the effects at the next mask are taken at
once, as that pass says so too. How many flips a set may hold is a trust region (Conn, Gould &
Toint, Trust-Region Methods, 2000): more after one that helps, fewer after one that does not. An
agent that learns from what moves bring may correct the model (``onp.agent.learner``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.agent.cost import Cost
from onp.agent.effects import Effects, flip_effects
from onp.agent.elite import Elite
from onp.agent.learner import Learner
from onp.agent.state import State
from onp.config import AgentConfig

GROWTH, SHRINKING = 2, 3
"""What the next set's size is multiplied by where a set helps, and divided by where it does not."""
LATELY = 2
"""Sets in a row that helped, after which the next one is expected to help too; so is the first."""


@dataclass(frozen=True)
class Round:
    """One round of ``improve``."""

    flips: int
    """Sites of the set that was evaluated."""
    gain: float
    """Its reward: change of the worth."""
    loss: float
    """Of what was foreseen against it, before the agent learned from it; 0 without learning."""
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
    """Improve the best mask in ``elite`` (not empty) until some rounds in a row bring next to
    nothing, or nothing promises anything.

    The worths in ``elite`` must be those of ``cost``. Without a learner the model of the margins is
    trusted as it is.
    """
    rounds: list[Round] = []
    present = None if learner is None else cost.parts(elite.best[None])
    found: Effects | None = None
    state: State | None = None
    harmful = torch.zeros(cost.sites, dtype=torch.bool, device=cost.device)
    reach, idle, helped = min(config.first, config.most), 0, LATELY
    for number in range(config.rounds):
        mask, best = elite.best, elite.worths[0]
        if found is None:
            found = flip_effects(cost, mask)
        if learner is not None and state is None:
            state = State.of(mask, found)
        caution = None if learner is None or state is None else learner.caution(state)
        effects = found.scaled(caution)
        move = torch.tensor(effects.grown(promising(effects, harmful, config.pool), reach))
        if not len(move):
            break
        masks = flipped(mask, [move])
        last = number + 1 == config.rounds or idle + 1 == config.patience
        hopeful = helped >= LATELY and not last and cost.trusts_gradients
        ahead = flip_effects(cost, masks[0]) if hopeful else None
        parts = cost.parts(masks)
        worths = cost.worth(masks, parts).cpu()
        elite.offer(masks, worths)
        loss = 0.0
        if learner is not None and state is not None and present is not None:
            loss = learner.learn(state, [move], parts.gains(present))
        gain = float(worths) - best
        if elite.worths[0] > best:
            found, state, present = ahead, None, parts
            harmful[:] = False
            reach, helped = min(GROWTH * len(move), config.most), helped + 1
        else:
            harmful[move] |= len(move) == 1
            reach, helped = max(1, len(move) // SHRINKING), 0
        idle = 0 if gain > config.little else idle + 1
        rounds.append(Round(len(move), gain, loss, elite.worths[0]))
        report(number, rounds[-1])
        if idle == config.patience:
            break
    return rounds


def promising(effects: Effects, harmful: Tensor, count: int) -> Tensor:
    """The sites int64 [n] whose flips promise most, ``count`` at most; none of ``harmful`` bool
    [S], whose flips alone have turned out to do harm, nor any whose gain is not a number."""
    gains = effects.alone().masked_fill(harmful, torch.nan)
    order = gains.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:count]
    return order[~gains[order].isnan()]


def give_back(mask: Tensor, cost: Cost, rounds: int) -> Tensor:
    """Open again what need not be pruned by ``cost``, of images the search has not seen: what it
    pruned by their chance. mask bool [S]; returns one that is worth as much or more."""
    for _ in range(rounds):
        effects = flip_effects(cost, mask).scaled()
        best = float(cost.worth(mask[None]))
        pool = mask.nonzero().squeeze(1).to(cost.device)
        order = effects.grown(pool, len(pool))
        sizes = sorted({len(order) * share // 8 for share in (1, 2, 4, 6, 8)} - {0})
        if not sizes:
            break
        opened = flipped(mask, [torch.tensor(order[:size]) for size in sizes])
        worths = cost.worth(opened).cpu()
        if float(worths.max()) <= best:
            break
        mask = opened[int(worths.argmax())]
    return mask


def flipped(mask: Tensor, moves: Sequence[Tensor]) -> Tensor:
    """``mask`` bool [S] with the sites of each move int64 [n] flipped, bool [len(moves), S]."""
    masks = mask.repeat(len(moves), 1)
    for row, sites in zip(masks, moves, strict=True):
        row[sites] ^= True
    return masks
