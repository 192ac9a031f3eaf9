"""The policy: a GNN over the neuron graph that says how far flips of each site can be trusted.

The model of the margins (``onp.agent.effects``) foresees what flips do, as if networks were linear.
By how much each site's flip really moves the margins of clean and of triggered images depends on
the site, its neighbours and what of them is pruned: that is what is learned, as two factors a site.
Planning with the corrected model is the action: flips alone, and sets grown in it. So the agent is
a model-based one (Sutton, Dyna, SIGART Bulletin 2, 1991): what it learns is the model, from the
rewards on clean and on triggered images that its moves turn out to have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.effects import CAUTION, Effects
from onp.graph import NeuronGraph
from onp.ops.message_passing import message_passing

UNIT = 0.02
"""Nats an image: gains are compared as asinh(gain / UNIT), linear around nothing and logarithmic
beyond."""
FURTHEST = 2.0
"""Largest absolute logarithm of a correction."""


@dataclass(frozen=True)
class State:
    """A mask and what flips would lead on to."""

    inputs: Tensor
    """float32 [S, INPUTS], of size about one; the last column is the mask's."""
    effects: Effects
    """Uncorrected."""

    INPUTS = 7

    @classmethod
    def of(cls, pruned: Tensor, effects: Effects) -> State:
        """Of a mask bool [S]."""
        changes = (effects.clean_change, effects.triggered_change)
        cautious = effects.scaled()
        gains = effects.gains(cautious.clean_change, cautious.triggered_change)
        columns = [torch.asinh(gain / UNIT) for gain in gains]
        columns += [torch.asinh(change.square().mean(0).sqrt() / 0.3) for change in changes]
        columns += [torch.asinh(change.mean(0) / 0.3) for change in changes]
        return cls(torch.cat([torch.stack(columns, 1) / 2, pruned[:, None].float()], 1), effects)


class GraphLayer(nn.Module):
    """h + MLP([h, mean over each relation's neighbours of h]); [B, S, D] -> [B, S, D]."""

    def __init__(self, relations: int, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Linear(hidden * (1 + relations), hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h: Tensor, graph: NeuronGraph) -> Tensor:
        messages = [message_passing(h, r.weight, r.graph) for r in graph.relations]
        out: Tensor = self.norm(h + F.relu(self.mix(torch.cat([h, *messages], -1))))
        return out


class CautionPolicy(nn.Module):
    """Factors on the linear changes of the margins, float32 [B, S, 2] for B states of a network: on
    clean and on triggered images. Its weights hold for every network."""

    def __init__(
        self, features: int, relations: int, *, hidden: int, rounds: int, seed: int
    ) -> None:
        """features: columns of a site's features, whatever the mask. rounds: of message passing
        over ``relations`` kinds of edges; 0 looks at every site alone."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # building layers draws on the global state
            torch.manual_seed(seed)
            self.embed = nn.Linear(features + State.INPUTS, hidden)
            self.layers = nn.ModuleList(GraphLayer(relations, hidden) for _ in range(rounds))
            self.factors = nn.Linear(hidden, 2)
        nn.init.zeros_(self.factors.weight)
        nn.init.zeros_(self.factors.bias)

    def forward(self, graph: NeuronGraph, features: Tensor, states: list[State]) -> Tensor:
        """features: float32 [S, F]."""
        inputs = torch.stack([state.inputs for state in states])
        fixed = features.expand(len(states), -1, -1) / 2
        h = F.relu(self.embed(torch.cat([fixed, inputs], -1)))
        for layer in self.layers:
            h = layer(h, graph)
        corrections: Tensor = self.factors(h).clamp(-FURTHEST, FURTHEST).exp()
        return corrections * torch.tensor(CAUTION)
