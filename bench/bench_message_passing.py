"""Message passing, forward and with gradients, against torch's own ways to do it.

Baselines: ``index_add`` (the reference), ``torch.sparse`` CSR (one sparse matrix times the
features of one graph; the batch goes into the columns) and torch_scatter where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from onp.ops.csr import CsrGraph
from onp.ops.message_passing import message_passing

SHAPES = {
    "5k-nodes-80k-edges-64": (5_000, 80_000, 1, 64),
    "1k-nodes-16k-edges-b32-d32": (1_000, 16_000, 32, 32),
}
BACKENDS = ["native", "torch", "torch_sparse"]
if importlib.util.find_spec("torch_scatter") is not None:
    BACKENDS.append("torch_scatter")


def inputs(shape: str) -> tuple[Tensor, Tensor, CsrGraph]:
    nodes, edges, batch, features = SHAPES[shape]
    torch.manual_seed(0)
    rows = torch.randint(nodes, (edges,)).sort().values
    indptr = torch.zeros(nodes + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)
    graph = CsrGraph.from_csr(indptr, torch.randint(nodes, (edges,)))
    return torch.randn(batch, nodes, features), torch.randn(edges), graph


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(benchmark: BenchmarkFixture, backend: str, shape: str) -> None:
    x, weight, graph = inputs(shape)
    run: Callable[[], Tensor]
    if backend == "torch_sparse":
        matrix = torch.sparse_csr_tensor(
            graph.indptr, graph.indices, weight, (graph.nodes, graph.nodes)
        )
        columns = x.transpose(0, 1).reshape(graph.nodes, -1)

        def run() -> Tensor:
            return (matrix @ columns).view(graph.nodes, *x.shape[::2]).transpose(0, 1)
    else:

        def run() -> Tensor:
            return message_passing(x, weight, graph, backend)

    expected = message_passing(x.double(), weight.double(), graph, "torch")
    torch.testing.assert_close(run().double(), expected, rtol=1e-4, atol=1e-4)
    benchmark(run)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch_sparse"])
def test_forward_and_gradients(benchmark: BenchmarkFixture, backend: str, shape: str) -> None:
    x, weight, graph = inputs(shape)
    x.requires_grad_()
    weight.requires_grad_()
    target = torch.randn(x.shape)

    def run(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        out = message_passing(x, weight, graph, backend)
        return torch.autograd.grad(out, (x, weight), target.to(out))

    exact = run(x.double(), weight.double(), "torch")
    for got, expected in zip(run(x, weight, backend), exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
    benchmark(run, x, weight, backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_forward_and_gradients_on_cuda(benchmark: BenchmarkFixture, backend: str) -> None:
    x, weight, graph = inputs("1k-nodes-16k-edges-b32-d32")
    x, weight = x.cuda().requires_grad_(), weight.cuda().requires_grad_()
    graph = graph.to("cuda")
    target = torch.randn_like(x)

    def run(backend: str) -> tuple[Tensor, ...]:
        out = message_passing(x, weight, graph, backend)
        gradients = torch.autograd.grad(out, (x, weight), target)
        torch.cuda.synchronize()
        return gradients

    for got, expected in zip(run(backend), run("torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    benchmark(run, backend)
