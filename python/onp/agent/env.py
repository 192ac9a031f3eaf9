"""The pruning environment: copies of one network whose masks a policy edits, in batches.

Follows Gymnasium's contract (reset, step, terminated, truncated) with a batch as the state of all
copies at once, so that a step is one call of the mask engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Worth = Callable[[Tensor], Tensor]
"""Masks bool [B, S] -> worth float32 [B]."""


@dataclass(frozen=True)
class Observation:
    """What the policy sees of each copy."""

    pruned: Tensor
    """bool [B, S]: the mask so far."""
    worth: Tensor
    """float32 [B]: its worth."""
    left: int
    """Steps left in the episode."""


class PruningEnv:
    """B copies; an action flips sites of the mask; the reward is the change of the mask's worth."""

    def __init__(self, worth: Worth, sites: int, copies: int, steps: int) -> None:
        self.worth = worth
        self.sites = sites
        self.copies = copies
        self.steps = steps
        self.evaluations = 0
        """Masks evaluated so far."""
        self.state: Observation | None = None

    def reset(self, start: Tensor) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode of every copy at the mask ``start`` bool [S]."""
        worth = self.worth(start[None])
        self.evaluations += 1
        self.state = Observation(
            start.expand(self.copies, -1).clone(), worth.expand(self.copies).clone(), self.steps
        )
        return self.state, {}

    def step(self, flips: Tensor) -> tuple[Observation, Tensor, bool, bool, dict[str, Any]]:
        """Flip sites bool [B, S]; returns (observation, reward [B], terminated, truncated, info).

        Episodes end by length alone, all copies together.
        """
        if self.state is None or self.state.left == 0:
            raise RuntimeError("PruningEnv.step: the episode is over; call reset first")
        if flips.shape != (self.copies, self.sites) or flips.dtype != torch.bool:
            raise ValueError(
                f"PruningEnv.step: flips must be bool [{self.copies}, {self.sites}], "
                f"got {flips.dtype} {tuple(flips.shape)}"
            )
        pruned = self.state.pruned ^ flips
        worth = self.worth(pruned)
        self.evaluations += len(pruned)
        reward = worth - self.state.worth
        self.state = Observation(pruned, worth, self.state.left - 1)
        return self.state, reward, False, self.state.left == 0, {"flips": flips.sum(1)}
