"""The policy: a GNN over the neuron graph that says what flipping each site is worth.

An action's value is what the mask's worth gains by it (every state is looked at anew, so an
episode is one move), and the policy is greedy in the values. They start from the gain that the
model of the margins foresees (``onp.agent.effects``); what is learned, from the gains that moves
turn out to have on this network, is a correction, by what is known of the site and its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.effects import Effects
from onp.graph import NeuronGraph
from onp.ops.message_passing import message_passing

UNIT = 0.005
"""Nats an image: values are asinh(gain / UNIT), linear around nothing and logarithmic beyond."""


@dataclass(frozen=True)
class State:
    """What the flips that lead on from a mask would do, and their gains as foreseen."""

    inputs: Tensor
    """float32 [S, INPUTS], of size about one; the last column is the mask's."""
    foreseen: Tensor
    """float32 [S]: gain of worth by each flip alone, in nats an image."""

    INPUTS = 5

    @classmethod
    def of(cls, pruned: Tensor, effects: Effects) -> State:
        """Of a mask bool [S]."""
        clean, triggered = effects.gains(effects.clean_change, effects.triggered_change)
        moved = [
            change.square().mean(0).sqrt()
            for change in (effects.clean_change, effects.triggered_change)
        ]
        columns = [torch.asinh(gain / (2 * UNIT)) for gain in (clean, triggered)]
        columns += [torch.asinh(change / 0.3) for change in moved] + [pruned.float()]
        return cls(torch.stack(columns, 1) / 2, clean + triggered + effects.price)


class GraphLayer(nn.Module):
    """h + MLP([h, mean over each relation's neighbours of h]); [B, S, D] -> [B, S, D]."""

    def __init__(self, graph: NeuronGraph, hidden: int) -> None:
        super().__init__()
        self.graph = graph
        self.mix = nn.Linear(hidden * (1 + len(graph.relations)), hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h: Tensor) -> Tensor:
        messages = [message_passing(h, r.weight, r.graph) for r in self.graph.relations]
        out: Tensor = self.norm(h + F.relu(self.mix(torch.cat([h, *messages], -1))))
        return out


class FlipPolicy(nn.Module):
    """Values of all flips of B states of one network, float32 [B, S], as asinh(gain / UNIT)."""

    def __init__(
        self, graph: NeuronGraph, features: Tensor, *, hidden: int, rounds: int, seed: int
    ) -> None:
        """features: float32 [S, F], of the sites whatever the mask. rounds: of message passing; 0
        looks at every site alone."""
        super().__init__()
        self.features = features
        with torch.random.fork_rng(devices=[]):  # building layers draws on the global state
            torch.manual_seed(seed)
            self.embed = nn.Linear(features.shape[1] + State.INPUTS, hidden)
            self.layers = nn.ModuleList(GraphLayer(graph, hidden) for _ in range(rounds))
            self.value = nn.Linear(hidden, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, states: list[State]) -> Tensor:
        inputs = torch.stack([state.inputs for state in states])
        fixed = self.features.expand(len(states), -1, -1) / 2
        h = F.relu(self.embed(torch.cat([fixed, inputs], -1)))
        for layer in self.layers:
            h = layer(h)
        foreseen = torch.stack([state.foreseen for state in states])
        out: Tensor = torch.asinh(foreseen / UNIT) + self.value(h).squeeze(-1)
        return out
