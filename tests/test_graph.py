"""The neuron graph and its features on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onp.config import GraphConfig
from onp.features import NAMES, channel_lipschitz, node_features
from onp.graph import Relation, build_graph
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import Trace, trace
from tests.networks import BUILDERS, network


def _layer_of(traced: Trace) -> torch.Tensor:
    return torch.repeat_interleave(
        torch.arange(len(traced.layers)), torch.tensor([layer.channels for layer in traced.layers])
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_edges_join_what_is_connected(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    graph = build_graph(traced, model)
    layer = _layer_of(traced)
    for relation in graph.relations:
        rows = torch.repeat_interleave(torch.arange(graph.nodes), relation.graph.indptr.diff())
        sums = torch.zeros(graph.nodes).index_add_(0, rows, relation.weight)
        has_edges = relation.graph.indptr.diff() > 0
        torch.testing.assert_close(sums[has_edges], torch.ones(int(has_edges.sum())))
    incoming = graph.incoming.graph
    rows = torch.repeat_interleave(torch.arange(graph.nodes), incoming.indptr.diff())
    consumers = {
        (sink_number, source_number)
        for sink_number, sink in enumerate(traced.layers)
        for source_number, source in enumerate(traced.layers)
        if set(source.consumers) & set(sink.producers)
    }
    joined = set(zip(layer[rows].tolist(), layer[incoming.indices].tolist(), strict=True))
    assert joined
    assert joined <= consumers
    similar = graph.similar.graph
    rows = torch.repeat_interleave(torch.arange(graph.nodes), similar.indptr.diff())
    assert torch.equal(layer[rows], layer[similar.indices])
    assert torch.equal(graph.outgoing.graph.indices.bincount(minlength=graph.nodes) > 0,
                       incoming.indptr.diff() > 0)  # fmt: skip


def test_layerwise_keeps_only_edges_within_layers() -> None:
    model = network("resnet20")
    traced = trace(model, (3, 32, 32))
    graph = build_graph(traced, model, GraphConfig(layerwise=True))
    assert graph.incoming.graph.edges == graph.outgoing.graph.edges == 0
    assert graph.similar.graph.edges == build_graph(traced, model).similar.graph.edges > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILDERS)
def test_a_graph_built_on_cuda_is_that_of_the_cpu(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    expected = build_graph(traced, model)
    got = build_graph(traced, model.to("cuda"))
    assert got.incoming.graph.device.type == "cpu"
    for one, other in zip(got.relations, expected.relations, strict=True):
        matrix, wanted = (_dense(relation, got.nodes) for relation in (one, other))
        differ = (matrix > 0) != (wanted > 0)  # at the threshold, and between near equals
        assert differ.sum() <= 0.002 * len(other.weight)
        same = ~differ.any(1)
        torch.testing.assert_close(matrix[same], wanted[same], rtol=1e-4, atol=1e-5)
    for part in ("strength_in", "strength_out"):
        torch.testing.assert_close(getattr(got, part), getattr(expected, part))


def _dense(relation: Relation, nodes: int) -> torch.Tensor:
    rows = torch.repeat_interleave(torch.arange(nodes), relation.graph.indptr.diff())
    matrix = torch.zeros(nodes, nodes)
    return matrix.index_put((rows, relation.graph.indices), relation.weight)


def test_the_strongest_connection_is_an_edge_and_twins_are_similar() -> None:
    torch.manual_seed(0)
    one, two, head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 2)
    model = nn.Sequential(
        one, nn.ReLU(), two, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    ).eval()
    with torch.no_grad():
        two.weight[3, 4] = 9.0  # site 4 of the first layer feeds site 3 of the second
        two.weight[:, 1] = two.weight[:, 0] * 1.01  # sites 0 and 1 connect alike
    traced = trace(model, (3, 12, 12))
    graph = build_graph(traced, model, GraphConfig(strongest=1, neighbours=1))
    incoming = graph.incoming.graph
    node = 6 + 3
    assert 4 in incoming.indices[incoming.indptr[node] : incoming.indptr[node + 1]].tolist()
    similar = graph.similar.graph
    assert 1 in similar.indices[similar.indptr[0] : similar.indptr[1]].tolist()


@pytest.mark.parametrize("name", BUILDERS)
def test_features_are_finite_and_normalised_within_the_layer(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    graph = build_graph(traced, model)
    random = torch.Generator().manual_seed(0)
    response = [torch.rand(traced.sites, generator=random) for _ in range(5)]
    statistics = torch.rand(traced.sites, 3, generator=random)
    features = node_features(
        traced, model, graph, statistics, *response[:3], response[3:4], response[4:]
    )
    assert features.shape == (traced.sites, len(NAMES))
    assert features.isfinite().all()
    assert features.abs().max() <= 5
    assert len(set(NAMES)) == len(NAMES)
    for number, name in enumerate(("norm_shift", "gate", "unlearning")):
        given = [r if i != number else r.flip(0) for i, r in enumerate(response[:3])]
        other = node_features(traced, model, graph, statistics, *given, response[3:4], response[4:])
        changed = (other != features).any(0).nonzero().squeeze(1).tolist()
        assert changed == [NAMES.index(name)]
    column = NAMES.index("response")
    for layer in traced.layers:
        assert float(features[layer.sites, column].mean()) == pytest.approx(0, abs=1e-4)
    without = node_features(traced, model, graph, statistics, *response[:3], [], [])
    assert without.isfinite().all()
    assert not without[:, column].any()


def test_channel_lipschitz_is_the_largest_singular_value_times_the_norms_scale() -> None:
    model = network("vgg11_bn")
    traced = trace(model, (3, 32, 32))
    bound = channel_lipschitz(traced, model)
    conv, norm = model.get_submodule("features.4"), model.get_submodule("features.5")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    layer = traced.layers[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = torch.linalg.svdvals(conv.weight.flatten(2))[:, 0] * scale.abs()
    torch.testing.assert_close(bound[layer.sites], expected.detach(), rtol=1e-3, atol=1e-5)


def test_responses_point_at_the_changed_channel() -> None:
    from onp.ledger import Ledger
    from onp.probes.responses import activation_statistics, activations, responses

    model = network("resnet20")
    traced = trace(model, (3, 32, 32))
    frozen = FrozenNetwork(traced, model)
    images = torch.rand(6, 3, 32, 32)
    before = activations(frozen, images)
    statistics = activation_statistics(before)
    assert statistics.shape == (traced.sites, 3)
    ledger = Ledger()
    same = responses(before, frozen, images, ledger)
    assert not same.any()
    assert ledger.total == 6
    changed = [value.clone() for value in before]
    changed[2][:, 5] += 1.0
    response = responses(changed, frozen, images, ledger)
    assert int(response.argmax()) == traced.layers[2].start + 5
