"""Message passing, forward and with both gradients, against torch's own ways."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels.gate import TOLERANCE, timed
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row
from onp.ops.csr import CsrGraph
from onp.ops.message_passing import message_passing
from onp.ops.reference import csr_rows

KERNEL = "message_passing"


@dataclass(frozen=True)
class Shape:
    nodes: int
    edges: int
    batch: int
    features: int
    target: float
    """Ratio to the best baseline that is aimed at in fp32."""

    def gbytes(self, dtype: torch.dtype) -> float:
        """Gathered and written by a forward, with edges of an 8-byte column and a weight; where
        gathers hit the cache, this can pass what memory gives."""
        each = (self.edges + self.nodes) * self.features * dtype.itemsize
        return (self.batch * each + (8 + dtype.itemsize) * self.edges) / 1e9


SHAPES = {
    "5k nodes, 80k edges, 32 x 64": Shape(5_000, 80_000, 32, 64, 1.5),
    "200k nodes, 3.2M edges, 64": Shape(200_000, 3_200_000, 1, 64, 1.5),
}
QUICK = "5k nodes, 80k edges, 32 x 64"
GPU_SHAPES = {
    "200k nodes, 3.2M edges, 64": Shape(200_000, 3_200_000, 1, 64, 1.5),
    "1M nodes, 16M edges, 64": Shape(1_000_000, 16_000_000, 1, 64, 1.5),
    "5k nodes, 80k edges, 256 x 64": Shape(5_000, 80_000, 256, 64, 1.5),
}


def inputs(shape: Shape, device: str = "cpu") -> tuple[Tensor, Tensor, CsrGraph]:
    """Features, weights and a graph without double edges, which torch.sparse would merge."""
    random = torch.Generator(device).manual_seed(0)
    more = shape.edges + shape.edges // 8
    drawn = torch.randint(shape.nodes**2, (more,), generator=random, device=device)
    drawn = drawn.unique()
    drawn = (
        drawn[torch.randperm(len(drawn), generator=random, device=device)[: shape.edges]]
        .sort()
        .values
    )
    assert len(drawn) == shape.edges
    indptr = torch.zeros(shape.nodes + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(drawn // shape.nodes, minlength=shape.nodes).cumsum(0)
    graph = CsrGraph.from_csr(indptr, drawn.cpu() % shape.nodes).to(device)
    size = (shape.batch, shape.nodes, shape.features)
    x = torch.randn(size, generator=random, device=device)
    return x, torch.randn(shape.edges, generator=random, device=device), graph


def sparse(x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
    """One sparse matrix times the features of all copies side by side."""
    size = (graph.nodes, graph.nodes)
    matrix = torch.sparse_csr_tensor(graph.indptr, graph.indices, weight, size)
    columns = x.transpose(0, 1).reshape(graph.nodes, -1)
    out: Tensor = (matrix @ columns).view(graph.nodes, len(x), -1).transpose(0, 1)
    return out


class _SampledProduct(torch.autograd.Function):
    """``sparse`` with gradients by a careful user: autograd's own of the weights is a dense matrix
    of all pairs of nodes on a GPU, which large graphs have no room for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(x, weight)
        return sparse(x, weight, graph)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), graph = ctx.saved_tensors, ctx.graph
        size = (graph.nodes, graph.nodes)
        transposed = torch.sparse_csr_tensor(
            graph.t_indptr, graph.t_indices, weight[graph.t_edge], size
        )
        pattern = torch.sparse_csr_tensor(
            graph.indptr, graph.indices, torch.zeros_like(weight), size
        )
        own, read = (part.transpose(0, 1).reshape(graph.nodes, -1) for part in (grad, x))
        x_grad = (transposed @ own).view(graph.nodes, len(x), -1).transpose(0, 1)
        sampled = torch.sparse.sampled_addmm(pattern, own, read.T, beta=0.0)
        return x_grad, sampled.values(), None


def sampled(x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
    """``sparse``, its gradients of the weights only where there are edges."""
    out: Tensor = _SampledProduct.apply(x, weight, graph)  # type: ignore[no-untyped-call]
    return out


def scatter(x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
    """torch_scatter, on sorted rows."""
    from torch_scatter import segment_csr

    out: Tensor = segment_csr(weight[:, None] * x[:, graph.indices], graph.indptr[None])
    return out


def pyg_scatter(x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
    """PyTorch Geometric's scatter, which needs no torch_scatter."""
    from torch_geometric.utils import scatter as scatter_sum

    rows, messages = csr_rows(graph.indptr), weight[:, None] * x[:, graph.indices]
    out: Tensor = scatter_sum(messages, rows, dim=1, dim_size=graph.nodes, reduce="sum")
    return out


SAMPLED = "torch.sparse, sampled gradients"
Way = Callable[[Tensor, Tensor, CsrGraph], Tensor]
WAYS: dict[str, Way] = {
    "onp": lambda x, weight, graph: message_passing(x, weight, graph),
    "torch index_add": lambda x, weight, graph: message_passing(x, weight, graph, "torch"),
    "torch.sparse": sparse,
    SAMPLED: sampled,
}
for package, way in (("torch_scatter", scatter), ("torch_geometric", pyg_scatter)):
    if importlib.util.find_spec(package) is not None:
        WAYS[package] = way


def both(call: Way, x: Tensor, weight: Tensor, graph: CsrGraph) -> Sequence[Tensor]:
    """Forward, and the gradients of features and weights."""
    leaves = x.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    out = call(*leaves, graph)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def rows(quick: bool, repeats: int, ceilings: Ceilings, device: str = "cpu") -> Iterator[Row]:
    """Both directions of every shape, in fp32 and in bf16, where torch.sparse is the one other."""
    warnings.filterwarnings("ignore", message="Sparse CSR")
    for name, shape in (SHAPES if device == "cpu" else GPU_SHAPES).items():
        if quick and device == "cpu" and name != QUICK:
            continue
        x, weight, graph = inputs(shape, device)
        for direction, does in (
            ("forward", lambda call, *args: [call(*args)]),
            ("forward and backward", both),
        ):
            known: dict[str, float] = {}
            for dtype in (torch.float32, torch.bfloat16):
                exact = dtype == torch.float32
                given = x.to(dtype), weight.to(dtype), graph
                wide = (part.float() for part in given[:2])
                expected = does(WAYS["torch index_add"], *wide, graph)
                precision, tolerance = ("fp32", TOLERANCE) if exact else ("reduced", 2e-2)
                for way, call in WAYS.items():
                    if not exact and way not in ("onp", "torch.sparse", SAMPLED):
                        continue
                    if way == SAMPLED and direction == "forward":
                        continue
                    row = Row(KERNEL, f"{name}, {direction}", way, precision, None, False)
                    row = replace(row, target=shape.target if way == "onp" and exact else None)
                    run = partial(does, call, *given)
                    row = timed(row, run, expected, repeats, tolerance)
                    if row.seconds is not None:
                        row = replace(row, note=", ".join(notes(row, known)))
                        if exact:
                            known[way] = row.seconds
                    if direction == "forward" and row.seconds is not None:
                        share = shape.gbytes(dtype) / row.seconds / ceilings.copy_gbytes
                        row = replace(row, share_of_peak=round(share, 3))
                    yield row


def notes(row: Row, known: dict[str, float]) -> Iterator[str]:
    """What a row's figures are shares and multiples of; known: seconds in fp32, by way."""
    assert row.seconds is not None
    if row.case.endswith("forward"):
        yield "of copy bandwidth"
    if row.precision == "reduced" and "torch.sparse" in known:
        yield f"{known['torch.sparse'] / row.seconds:.1f} times torch.sparse in fp32"
