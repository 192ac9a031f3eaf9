"""The agent's model: a GNN that says how far what is foreseen of each site's flip can be trusted.

The model of the margins (``onp.agent.effects``) foresees what flips do, as if networks were linear.
By how much each site's flip really moves the margins of clean and of triggered images depends on
the site, its neighbours and what of them is pruned: that is what is learned, as two factors a site.
The action is a set of flips grown in the corrected model. So the agent is
a model-based one (Sutton, Dyna, SIGART Bulletin 2, 1991): what it learns is the model, from the
rewards on clean and on triggered images that its moves turn out to have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.effects import CAUTION
from onp.agent.gnn import GraphLayer
from onp.agent.state import State
from onp.graph import NeuronGraph

FURTHEST = 2.0
"""Largest absolute logarithm of a correction."""


class CautionModel(nn.Module):
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
        self.register_buffer("start", torch.tensor(CAUTION), persistent=False)
        self.start: Tensor
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
        return corrections * self.start
