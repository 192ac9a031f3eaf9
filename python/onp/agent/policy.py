"""The policy: a GNN over the neuron graph, a flip logit per node, a value per network copy.

The logits start from a prior made of the features (``flip_prior``), and the network's last layer
starts at zero: before any learning the agent searches where the probes point, and what it learns
is a correction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.env import Observation
from onp.graph import NeuronGraph
from onp.ops.message_passing import message_passing


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


class PruningPolicy(nn.Module):
    """Flip logits [B, S] and values [B] for B copies of one network."""

    def __init__(
        self,
        graph: NeuronGraph,
        features: Tensor,
        prior: Tensor,
        *,
        hidden: int,
        rounds: int,
        generator: torch.Generator,
    ) -> None:
        """features: float32 [S, F]. prior: float32 [S], prune-if-positive evidence."""
        super().__init__()
        self.features = features
        self.prior = prior
        self.embed = nn.Linear(features.shape[1] + 2, hidden)
        self.layers = nn.ModuleList(GraphLayer(graph, hidden) for _ in range(rounds))
        self.flip = nn.Linear(2 * hidden, 2)
        self.value = nn.Linear(hidden + 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                with torch.no_grad():
                    module.weight.uniform_(-bound, bound, generator=generator)
                    module.bias.zero_()
        nn.init.zeros_(self.flip.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, state: Observation) -> tuple[Tensor, Tensor]:
        pruned = state.pruned.float()[..., None]  # [B, S, 1]
        fixed = self.features.expand(len(pruned), -1, -1)
        prior = self.prior.view(1, -1, 1).expand(len(pruned), -1, -1).clamp(-3, 3)
        h = F.relu(self.embed(torch.cat([fixed, prior, pruned], -1)))
        for layer in self.layers:
            h = layer(h)
        whole = h.mean(1)  # [B, D]
        correction = self.flip(torch.cat([h, whole[:, None].expand_as(h)], -1))  # [B, S, 2]
        # one logit to prune a kept site, one to restore a pruned one
        learned = torch.where(state.pruned, correction[..., 1], correction[..., 0])
        start = torch.where(state.pruned, -self.prior, self.prior)
        left = torch.full_like(state.worth, float(state.left))
        value = self.value(torch.cat([whole, state.worth[:, None], left[:, None]], -1))
        return start + learned, value.squeeze(-1)


def flip_prior(ranking: Tensor, size: int, expected_flips: float) -> Tensor:
    """Logits float32 [S] that say how surely a site belongs in the mask.

    A site at place r of the ranking (0 = first) with a mask of ``size`` sites gets
    ``log(size / r)``-like evidence, shifted so that flipping with these odds from the ranking's
    own mask flips ``expected_flips`` sites on average: most flips fall where the ranking is
    unsure, near its cut.
    """
    places = torch.empty_like(ranking)
    places[ranking.argsort(descending=True, stable=True)] = torch.arange(
        len(ranking), dtype=ranking.dtype
    )
    evidence = 1.5 * ((size + 0.5) / (places + 1)).log()
    inside = places < size
    low, high = -20.0, 20.0
    for _ in range(40):  # bisection on the shift: flips fall as it grows
        shift = (low + high) / 2
        odds = torch.where(inside, -evidence, evidence) - shift
        low, high = (shift, high) if odds.sigmoid().sum() > expected_flips else (low, shift)
    return torch.where(inside, evidence + shift, evidence - shift)
