"""The agent on one network: it values flips, and learns from what they turn out to bring.

The rewards of a state are the gains of the flips that were evaluated in it. They are kept and
learned from again (experience replay, Lin, Machine Learning 8, 1992).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.agent.policy import UNIT, FlipPolicy, State
from onp.config import AgentConfig


class Learner:
    """A policy and what it has met."""

    def __init__(self, policy: FlipPolicy, config: AgentConfig, *, seed: int) -> None:
        self.policy = policy
        self.config = config
        self.memory: list[tuple[State, Tensor, Tensor]] = []
        """State, sites flipped int64 [n], gains float32 [n]."""
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)

    @torch.no_grad()
    def values(self, state: State) -> Tensor:
        """What each flip is worth, float32 [S]."""
        values: Tensor = self.policy([state])[0]
        return values

    def learn(self, state: State, sites: Tensor, gains: Tensor) -> float:
        """Take note of the gains float32 [n] of flipping ``sites`` int64 [n], and learn from them
        and some earlier ones; returns the loss on them before (0 where nothing is learned)."""
        if len(sites) == 0:
            return 0.0
        first = 0.0
        for step in range(self.config.steps):
            draw = torch.randperm(len(self.memory), generator=self.random)[: self.config.replayed]
            batch = [(state, sites, gains), *(self.memory[i] for i in draw.tolist())]
            values = self.policy([seen for seen, _, _ in batch])
            losses = [
                F.smooth_l1_loss(row[flipped], torch.asinh(gained / UNIT))
                for row, (_, flipped, gained) in zip(values, batch, strict=True)
            ]
            loss = torch.stack(losses).mean()
            first = float(losses[0].detach()) if step == 0 else first
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.memory.append((state, sites, gains))
        return first
