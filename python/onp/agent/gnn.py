"""Message passing over the neuron graph: the layer that the policy and the model share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.graph import NeuronGraph
from onp.ops.message_passing import message_passing


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
