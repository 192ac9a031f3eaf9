"""Message passing on the CPU, forward and with both gradients, against torch's own ways."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.kernels.gate import timed
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row
from onp.ops.csr import CsrGraph
from onp.ops.message_passing import message_passing

KERNEL = "message_passing"


@dataclass(frozen=True)
class Shape:
    nodes: int
    edges: int
    batch: int
    features: int
    target: float
    """Ratio to the best baseline that is aimed at in fp32."""

    @property
    def gbytes(self) -> float:
        """Gathered and written by a forward in fp32, with edges of 12 bytes; where gathers hit the
        cache, this can pass what memory gives."""
        each = (self.edges + self.nodes) * self.features * 4
        return (self.batch * each + 12 * self.edges) / 1e9


SHAPES = {
    "5k nodes, 80k edges, 32 x 64": Shape(5_000, 80_000, 32, 64, 1.5),
    "200k nodes, 3.2M edges, 64": Shape(200_000, 3_200_000, 1, 64, 1.5),
}
QUICK = "5k nodes, 80k edges, 32 x 64"


def inputs(shape: Shape) -> tuple[Tensor, Tensor, CsrGraph]:
    """Features, weights and a graph without double edges, which torch.sparse would merge."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(shape.nodes**2, (shape.edges + shape.edges // 8,), generator=random)
    drawn = drawn.unique()
    drawn = drawn[torch.randperm(len(drawn), generator=random)[: shape.edges]].sort().values
    assert len(drawn) == shape.edges
    indptr = torch.zeros(shape.nodes + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(drawn // shape.nodes, minlength=shape.nodes).cumsum(0)
    graph = CsrGraph.from_csr(indptr, drawn % shape.nodes)
    x = torch.randn(shape.batch, shape.nodes, shape.features, generator=random)
    return x, torch.randn(shape.edges, generator=random), graph


def sparse(x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
    """One sparse matrix times the features of all copies side by side."""
    size = (graph.nodes, graph.nodes)
    matrix = torch.sparse_csr_tensor(graph.indptr, graph.indices, weight, size)
    columns = x.transpose(0, 1).reshape(graph.nodes, -1)
    out: Tensor = (matrix @ columns).view(graph.nodes, len(x), -1).transpose(0, 1)
    return out


def scatter(x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
    """torch_scatter, on sorted rows."""
    from torch_scatter import segment_csr

    out: Tensor = segment_csr(weight[:, None] * x[:, graph.indices], graph.indptr[None])
    return out


Way = Callable[[Tensor, Tensor, CsrGraph], Tensor]
WAYS: dict[str, Way] = {
    "onp": lambda x, weight, graph: message_passing(x, weight, graph, "native"),
    "torch index_add": lambda x, weight, graph: message_passing(x, weight, graph, "torch"),
    "torch.sparse": sparse,
}
if importlib.util.find_spec("torch_scatter") is not None:
    WAYS["torch_scatter"] = scatter


def both(call: Way, x: Tensor, weight: Tensor, graph: CsrGraph) -> Sequence[Tensor]:
    """Forward, and the gradients of features and weights."""
    leaves = x.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    out = call(*leaves, graph)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def rows(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """Both directions of every shape."""
    warnings.filterwarnings("ignore", message="Sparse CSR")
    for name, shape in SHAPES.items():
        if quick and name != QUICK:
            continue
        given = inputs(shape)
        for direction, does in (
            ("forward", lambda call, *args: [call(*args)]),
            ("forward and backward", both),
        ):
            expected = does(WAYS["torch index_add"], *given)
            for way, call in WAYS.items():
                row = Row(KERNEL, f"{name}, {direction}", way, "fp32", None, False)
                row = replace(row, target=shape.target if way == "onp" else None)
                row = timed(row, partial(does, call, *given), expected, repeats)
                if direction == "forward" and row.seconds is not None:
                    share = shape.gbytes / row.seconds / ceilings.copy_gbytes
                    row = replace(row, share_of_peak=round(share, 3), note="of copy bandwidth")
                yield row
