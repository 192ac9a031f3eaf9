"""The neuron graph: sites as nodes, joined by connection strength and by similar connections.

Li, Yu & Yi (arXiv 2405.17746) model each layer as a graph of its neurons; two neurons are joined
where the cosine similarity of their connection strengths (L1 norms of the weights between
neurons) passes a threshold. onp joins those layers by the strongest connections themselves;
``layerwise=True`` leaves them out. Similarities are taken after the layer's mean profile is
subtracted: strengths are positive, so plain cosines all sit near one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onp.config import GraphConfig
from onp.ops.build_info import with_cuda
from onp.ops.csr import CsrGraph, csr_from_edges
from onp.ops.neuron_graph import (
    Edges,
    connection_strengths,
    similarity_edges_of,
    strongest_edges_of,
)
from onp.suspect.operations import Op
from onp.suspect.trace import SiteLayer, Trace


@dataclass(frozen=True)
class Relation:
    """One kind of edge over the S nodes; node i receives from ``graph``'s row i."""

    graph: CsrGraph
    weight: Tensor
    """float32 [E]; the weights of a row sum to 1, so that a message is a weighted mean."""

    def to(self, device: torch.device | str) -> Relation:
        """On a device."""
        return Relation(self.graph.to(device), self.weight.to(device))

    def __post_init__(self) -> None:
        if self.weight.shape != (self.graph.edges,):
            raise ValueError(
                f"Relation: weight must be [{self.graph.edges}], got {tuple(self.weight.shape)}"
            )


@dataclass(frozen=True)
class NeuronGraph:
    """S nodes and the relations messages travel along."""

    nodes: int
    incoming: Relation
    """From the sites a neuron reads."""
    outgoing: Relation
    """From the sites that read a neuron."""
    similar: Relation
    """Between neurons of one layer with similar connections; symmetric."""
    strength_in: Tensor
    """float32 [S]: summed strength of a site's incoming connections over its layer's mean."""
    strength_out: Tensor
    """float32 [S]: the same for outgoing connections."""

    def to(self, device: torch.device | str | None) -> NeuronGraph:
        """On a device; None: as it is."""
        if device is None or self.strength_in.device == torch.device(device):
            return self
        return NeuronGraph(
            self.nodes, self.incoming.to(device), self.outgoing.to(device), self.similar.to(device),
            self.strength_in.to(device), self.strength_out.to(device),
        )  # fmt: skip

    @property
    def relations(self) -> tuple[Relation, ...]:
        return self.incoming, self.outgoing, self.similar


def build_graph(trace: Trace, model: nn.Module, config: GraphConfig | None = None) -> NeuronGraph:
    """Build the graph from the weight tensors of ``model``, traced as ``trace``.

    It is in host memory. Where all weights are on one CUDA device, strengths and edges are found
    there; sums in another order may then change edges at the threshold and between near equals.
    """
    config = config or GraphConfig()
    joins = _joins(trace, model)
    device = joins[0].strength.device if joins else torch.device("cpu")
    profiles: dict[int, list[Tensor]] = {layer.start: [] for layer in trace.layers}
    strength_in = torch.zeros(trace.sites, device=device)
    strength_out = torch.zeros(trace.sites, device=device)
    for source, sink, strength in joins:
        profiles[source.start].append(strength.T)
        strength_out[source.sites] += strength.sum(0)
        if sink is not None:
            profiles[sink.start].append(strength)
            strength_in[sink.sites] += strength.sum(1)
    edges = [] if config.layerwise else _strongest(joins, config.strongest)
    similar = _similar(trace, profiles, config)
    return NeuronGraph(
        trace.sites,
        _relation(edges, trace.sites),
        _relation([Edges(cols, rows, values) for rows, cols, values in edges], trace.sites),
        _relation(similar, trace.sites),
        _over_layer_mean(strength_in.cpu(), trace),
        _over_layer_mean(strength_out.cpu(), trace),
    )


class _Join(NamedTuple):
    """A convolution or linear layer between two layers of sites."""

    source: SiteLayer
    sink: SiteLayer | None
    """The first layer that its outputs reach; None for the logits, and for what only weighs another
    value's channels."""
    strength: Tensor
    """float32 [sink channels (for the logits classes), source channels], of mean 1."""


def _joins(trace: Trace, model: nn.Module) -> list[_Join]:
    """Of every convolution and linear layer that reads sites; on the device of the weights."""
    places = [(source, consumer) for source in trace.layers for consumer in source.consumers]
    modules = [model.get_submodule(str(trace.ops[consumer].module)) for _, consumer in places]
    weights = [_weight(model, trace.ops[at], source.channels) for source, at in places]
    strengths = connection_strengths(_where_built(weights))
    joins = []
    for (source, consumer), module, strength in zip(places, modules, strengths, strict=True):
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            strength = _spread_groups(strength, module.groups, source.channels)
        sink = next((layer for layer in trace.layers if consumer in layer.producers), None)
        if sink is not None:
            strength = _by_sink_channel(trace, consumer, sink, strength)
        joins.append(_Join(source, sink, strength / strength.mean().clamp_min(1e-12)))
    return joins


def _weight(model: nn.Module, op: Op, channels: int) -> Tensor:
    """float32 [outputs, channels, *K]; of a grouped convolution the channels of a group."""
    weight = op.weights(model)[0].detach().float()
    return weight.reshape(len(weight), channels, -1) if op.kind == "linear" else weight


def _where_built(weights: list[Tensor]) -> list[Tensor]:
    """On the one CUDA device where all are, if there are kernels for it; else on the CPU."""
    if with_cuda() and len({weight.device for weight in weights}) == 1 and weights[0].is_cuda:
        return weights
    return [weight.cpu() for weight in weights]


def _spread_groups(strength: Tensor, groups: int, channels: int) -> Tensor:
    """[outputs, channels of a group] to [outputs, channels], 0 between groups."""
    outputs, per_group = strength.shape
    dense = strength.new_zeros(outputs, channels)
    group = torch.arange(outputs, device=dense.device) // (outputs // groups)
    columns = group[:, None] * per_group + torch.arange(per_group, device=dense.device)
    return dense.scatter_(1, columns, strength)


def _by_sink_channel(trace: Trace, consumer: int, sink: SiteLayer, strength: Tensor) -> Tensor:
    """Move rows from the consumer's output channels to the sink's channels (an option-A shortcut
    or a concatenation shifts them)."""
    outputs, channels = trace.channels.of_value[consumer], trace.channels.of_value[sink.value]
    if torch.equal(outputs, channels):
        return strength
    rows, to = (outputs[:, None] == channels).nonzero().T.to(strength.device)
    return strength.new_zeros(sink.channels, strength.shape[1]).index_add_(0, to, strength[rows])


def _strongest(joins: list[_Join], k: int) -> list[Edges]:
    """Between layers, by site, in host memory."""
    inner = [(source, sink, strength) for source, sink, strength in joins if sink is not None]
    found = _on_host(strongest_edges_of([strength for _, _, strength in inner], k))
    return [
        Edges(rows + sink.start, cols + source.start, values)
        for (source, sink, _), (rows, cols, values) in zip(inner, found, strict=True)
    ]


def _similar(trace: Trace, profiles: dict[int, list[Tensor]], config: GraphConfig) -> list[Edges]:
    """Within layers, by site, in host memory."""
    starts = [layer.start for layer in trace.layers if profiles[layer.start]]
    centred = [_centred(profiles[start]) for start in starts]
    found = _on_host(similarity_edges_of(centred, config.similarity, config.neighbours))
    return [
        Edges(rows + start, cols + start, values)
        for start, (rows, cols, values) in zip(starts, found, strict=True)
    ]


def _on_host(edges: list[Edges]) -> list[Edges]:
    """Copied all at once, where they are on a device."""
    if not edges or edges[0].rows.device.type == "cpu":
        return edges
    sizes = [len(one.rows) for one in edges]
    parts = (torch.cat(part).cpu().split(sizes) for part in zip(*edges, strict=True))
    return list(map(Edges, *parts))


def _centred(profiles: list[Tensor]) -> Tensor:
    """Connection-strength profiles [N, D] without the layer's mean, each part of unit scale."""
    parts = [part - part.mean(0, keepdim=True) for part in profiles]
    return torch.cat([part / part.norm().clamp_min(1e-12) for part in parts], 1).contiguous()


def _relation(edges: list[Edges], nodes: int) -> Relation:
    empty = torch.empty(0, dtype=torch.int64)
    parts = edges or [Edges(empty, empty, torch.empty(0))]
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    graph, weight = csr_from_edges(rows, columns, values, nodes)
    degree = graph.indptr.diff()
    row = torch.repeat_interleave(torch.arange(nodes), degree)
    total = torch.zeros(nodes, dtype=weight.dtype).index_add_(0, row, weight)
    return Relation(graph, weight / total[row].clamp_min(1e-12))


def _over_layer_mean(values: Tensor, trace: Trace) -> Tensor:
    parts = [values[layer.sites] for layer in trace.layers]
    return torch.cat([part / part.mean().clamp_min(1e-12) for part in parts])
