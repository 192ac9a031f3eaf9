"""The neuron graph: sites as nodes, joined by connection strength and by similar connections.

Li, Yu & Yi (arXiv 2405.17746) model each layer as a graph of its neurons; two neurons are joined
where the cosine similarity of their connection strengths (L1 norms of the weights between
neurons) passes a threshold. onp joins those layers by the strongest connections themselves;
``layerwise=True`` leaves them out. Similarities are taken after the layer's mean profile is
subtracted: strengths are positive, so plain cosines all sit near one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.config import GraphConfig
from onp.ops.csr import CsrGraph, csr_from_edges
from onp.ops.neuron_graph import connection_strength, similarity_edges, strongest_edges
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
    """Build the graph from the weight tensors of ``model``, traced as ``trace``."""
    config = config or GraphConfig()
    joins = _joins(trace, model)
    profiles: dict[int, list[Tensor]] = {layer.start: [] for layer in trace.layers}
    strength_in, strength_out = torch.zeros(trace.sites), torch.zeros(trace.sites)
    edges: list[tuple[Tensor, Tensor, Tensor]] = []
    for source, sink, strength in joins:
        profiles[source.start].append(strength.T)
        strength_out[source.sites] += strength.sum(0)
        if sink is None:
            continue
        profiles[sink.start].append(strength)
        strength_in[sink.sites] += strength.sum(1)
        if not config.layerwise:
            rows, columns, values = strongest_edges(strength, config.strongest)
            edges.append((rows + sink.start, columns + source.start, values))
    similar = [
        (rows + layer.start, columns + layer.start, values)
        for layer in trace.layers
        if profiles[layer.start]
        for rows, columns, values in [
            similarity_edges(_centred(profiles[layer.start]), config.similarity, config.neighbours)
        ]
    ]
    return NeuronGraph(
        trace.sites,
        _relation(edges, trace.sites),
        _relation([(columns, rows, values) for rows, columns, values in edges], trace.sites),
        _relation(similar, trace.sites),
        _over_layer_mean(strength_in, trace),
        _over_layer_mean(strength_out, trace),
    )


def _joins(trace: Trace, model: nn.Module) -> list[tuple[SiteLayer, SiteLayer | None, Tensor]]:
    """(source layer, sink layer, strength [sink channels, source channels]) of every conv/linear.

    The sink is the first layer that its outputs reach; None (rows are classes) for the logits.
    """
    joins = []
    for source in trace.layers:
        for consumer in source.consumers:
            module = model.get_submodule(str(trace.ops[consumer].module))
            assert isinstance(module, nn.Conv2d | nn.Linear)
            strength = _dense_strength(module, source.channels)
            sink = next((layer for layer in trace.layers if consumer in layer.producers), None)
            if sink is not None:
                strength = _by_sink_channel(trace, consumer, sink, strength)
            scale = strength.mean().clamp_min(1e-12)
            joins.append((source, sink, strength / scale))
    return joins


def _dense_strength(module: nn.Conv2d | nn.Linear, channels: int) -> Tensor:
    """L1 strengths [outputs, channels]; grouped convolutions are spread over all channels."""
    weight = module.weight.detach().float().cpu()  # edges are chosen on the CPU
    if isinstance(module, nn.Linear):
        return connection_strength(weight.reshape(len(weight), channels, -1).contiguous())
    strength = connection_strength(weight.contiguous())
    if module.groups == 1:
        return strength
    outputs, per_group = strength.shape
    dense = strength.new_zeros(outputs, channels)
    group = torch.arange(outputs) // (outputs // module.groups)
    columns = group[:, None] * per_group + torch.arange(per_group)
    return dense.scatter_(1, columns, strength)


def _by_sink_channel(trace: Trace, consumer: int, sink: SiteLayer, strength: Tensor) -> Tensor:
    """Move rows from the consumer's output channels to the sink's channels (an option-A shortcut
    or a concatenation shifts them)."""
    outputs, channels = trace.channels.of_value[consumer], trace.channels.of_value[sink.value]
    if torch.equal(outputs, channels):
        return strength
    place = {int(channel): index for index, channel in enumerate(channels)}
    moved = strength.new_zeros(sink.channels, strength.shape[1])
    for row, channel in enumerate(outputs.tolist()):
        if channel in place:
            moved[place[channel]] += strength[row]
    return moved


def _centred(profiles: list[Tensor]) -> Tensor:
    """Connection-strength profiles [N, D] without the layer's mean, each part of unit scale."""
    parts = [part - part.mean(0, keepdim=True) for part in profiles]
    return torch.cat([part / part.norm().clamp_min(1e-12) for part in parts], 1).contiguous()


def _relation(edges: list[tuple[Tensor, Tensor, Tensor]], nodes: int) -> Relation:
    empty = torch.empty(0, dtype=torch.int64)
    parts = edges or [(empty, empty, torch.empty(0))]
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    graph, weight = csr_from_edges(rows, columns, values, nodes)
    degree = graph.indptr.diff()
    row = torch.repeat_interleave(torch.arange(nodes), degree)
    total = torch.zeros(nodes).index_add_(0, row, weight)
    return Relation(graph, weight / total[row].clamp_min(1e-12))


def _over_layer_mean(values: Tensor, trace: Trace) -> Tensor:
    parts = [values[layer.sites] for layer in trace.layers]
    return torch.cat([part / part.mean().clamp_min(1e-12) for part in parts])
