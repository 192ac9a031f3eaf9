from __future__ import annotations

import pytest
import torch

from onp.errors import NativeError
from onp.ops.csr import CsrGraph, block_diagonal


def vector(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_transpose_of_a_small_graph() -> None:
    graph = CsrGraph.from_csr(vector(0, 2, 2, 3), vector(2, 1, 2))
    assert (graph.nodes, graph.edges) == (3, 3)
    assert graph.t_indptr.tolist() == [0, 0, 1, 3]
    assert graph.t_indices.tolist() == [0, 0, 2]
    assert graph.t_edge.tolist() == [1, 0, 2]


def test_strided_vectors_are_taken() -> None:
    graph = CsrGraph.from_csr(vector(0, 9, 1, 9, 2)[::2], vector(1, 9, 0)[::2])
    assert graph.indices.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        (vector(0, 1, 3), vector(0, 1), "indptr must run from 0 to 2, got 0 to 3"),
        (vector(1, 1, 2), vector(0, 1), "indptr must run from 0 to 2, got 1 to 2"),
        (vector(0, 3, 2), vector(0, 1), "indptr must not fall, got 2 after 3 at node 1"),
        (vector(0, 1, 2), vector(0, 2), r"indices must be in \[0, 2\), got 2 at edge 1"),
        (vector(0, 1, 2), vector(-1, 0), r"indices must be in \[0, 2\), got -1 at edge 0"),
    ],
)
def test_broken_contents_are_refused(
    indptr: torch.Tensor, indices: torch.Tensor, message: str
) -> None:
    with pytest.raises(NativeError, match=message):
        CsrGraph.from_csr(indptr, indices)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        (vector(0, 1).int(), vector(0), "indptr must be a contiguous int64 vector"),
        (vector(0, 1), vector(0)[:, None], "indices must be a contiguous int64 vector"),
        (vector(), vector(), r"indptr must have N \+ 1 entries"),
        (vector(0, 1).to("meta"), vector(0), "indptr must be on the CPU"),
    ],
)
def test_wrong_tensors_are_refused(
    indptr: torch.Tensor, indices: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CsrGraph.from_csr(indptr, indices)


def test_parts_must_fit_together() -> None:
    with pytest.raises(ValueError, match="indptr and t_indptr"):
        CsrGraph(vector(0, 1), vector(0), vector(0), vector(0), vector(0))
    with pytest.raises(ValueError, match="indices, t_indices and t_edge"):
        CsrGraph(vector(0, 1), vector(0), vector(0, 1), vector(0), vector())
    with pytest.raises(ValueError, match="one device"):
        CsrGraph(vector(0, 1), vector(0), vector(0, 1), vector(0), vector(0).to("meta"))


def test_block_diagonal_needs_a_graph() -> None:
    with pytest.raises(ValueError, match="at least one graph"):
        block_diagonal([])
    graph = CsrGraph.from_csr(vector(0, 1), vector(0))
    with pytest.raises(ValueError, match="on one device"):
        block_diagonal([graph, graph.to("meta")])
