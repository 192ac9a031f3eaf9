"""The agent on one network: it corrects what is foreseen, and learns from what moves really bring.

The rewards of a state are the gains, on clean and on triggered images, of the sets of flips that
were evaluated in it. They are kept and learned from again (experience replay, Lin, Machine
Learning 8, 1992).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.agent.caution import CautionModel
from onp.agent.effects import columns
from onp.agent.state import UNIT, State
from onp.config import AgentConfig
from onp.graph import NeuronGraph
from onp.optimizers import Adam


@dataclass(frozen=True)
class Experience:
    """B moves that were evaluated in a state."""

    state: State
    moves: Tensor
    """float32 [S, B]: see ``columns``."""
    gains: Tensor
    """float32 [2, B]: on clean and on triggered images, in nats an image."""

    def loss(self, caution: Tensor) -> Tensor:
        """How far the gains are from what is foreseen with factors float32 [S, 2]."""
        foreseen = torch.stack(self.state.effects.together(self.moves, caution))
        return F.smooth_l1_loss(torch.asinh(foreseen / UNIT), torch.asinh(self.gains / UNIT))


class Learner:
    """The model of one network, and what was met there."""

    def __init__(
        self,
        model: CautionModel,
        graph: NeuronGraph,
        features: Tensor,
        config: AgentConfig,
        *,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        """features: float32 [S, F]. All are brought to the states' ``device``."""
        self.model = model.to(device)
        self.graph = graph.to(device)
        self.features = features.to(device)
        self.config = config
        self.memory: list[Experience] = []
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = Adam((list(model.parameters()), config.learning_rate))

    @torch.no_grad()
    def caution(self, state: State) -> Tensor:
        """Factors on the changes that are foreseen, float32 [S, 2]."""
        factors: Tensor = self.model(self.graph, self.features, [state])[0]
        return factors

    def learn(self, state: State, moves: Sequence[Tensor], gains: Tensor) -> float:
        """Take note of the gains float32 [2, B] of the moves, sites flipped int64 each, and learn
        from them and some earlier ones; returns the loss on them before (0 where nothing is
        learned)."""
        flips = columns(moves, len(self.features)).to(gains.device)
        now = Experience(state, flips, gains)
        first = torch.zeros(())
        for step in range(self.config.steps):
            draw = torch.randperm(len(self.memory), generator=self.random)[: self.config.replayed]
            batch = [now, *(self.memory[i] for i in draw.tolist())]
            factors = self.model(self.graph, self.features, [seen.state for seen in batch])
            losses = [seen.loss(caution) for seen, caution in zip(batch, factors, strict=True)]
            first = losses[0].detach() if step == 0 else first
            self.optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            self.optimizer.step()
        self.memory.append(now)
        return float(first)
