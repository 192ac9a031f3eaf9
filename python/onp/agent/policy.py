"""The policy: a GNN that says of every site how far its gate should close, in one pass.

It is taught on many backdoored networks (``bench.train_agent``), by the gradient of what the gates
it proposes cost there (``onp.agent.relaxed``); no mask is imitated, and no true trigger is seen.
Its weights fit every network: its proposal is where the gates of a network can start from, and a
few steps of descent adapt them to it. How well it carries over ``bench.train_agent`` measures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.gnn import GraphLayer
from onp.agent.state import State
from onp.graph import NeuronGraph

HIDDEN = 32
OPEN = -4.0
"""Logarithmic odds at which gates close before anything is learned."""


class PruningPolicy(nn.Module):
    """How far each site's gate closes, float32 [S] in (0, 1), in a state of a network."""

    def __init__(self, features: int, relations: int, *, rounds: int, seed: int) -> None:
        """features: columns of a site's features. rounds: of message passing over ``relations``
        kinds of edges; 0 looks at every site alone."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # building layers draws on the global state
            torch.manual_seed(seed)
            self.embed = nn.Linear(features + State.INPUTS, HIDDEN)
            self.layers = nn.ModuleList(GraphLayer(relations, HIDDEN) for _ in range(rounds))
            self.mix = nn.Linear(HIDDEN, HIDDEN)
            self.odds = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.odds.weight)
        nn.init.constant_(self.odds.bias, OPEN)

    def forward(self, graph: NeuronGraph, features: Tensor, inputs: Tensor) -> Tensor:
        """features: float32 [S, F]. inputs: the state's, float32 [S, INPUTS]."""
        h = F.relu(self.embed(torch.cat([features / 2, inputs], 1)))[None]
        for layer in self.layers:
            h = layer(h, graph)
        closed: Tensor = self.odds(F.relu(self.mix(h[0]))).squeeze(1).sigmoid()
        return closed
