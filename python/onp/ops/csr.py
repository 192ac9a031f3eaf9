"""Graphs in compressed sparse rows, both directions, as the native operations read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from onp import _C


@dataclass(frozen=True, eq=False)
class CsrGraph:
    """A directed graph of N nodes and E edges with its transpose, validated when built.

    Make one with :meth:`from_csr` (or ``csr_from_edges``, ``block_diagonal``), which check the
    contents; operations trust them afterwards. All fields are contiguous int64 tensors of one
    device.
    """

    indptr: Tensor
    """``[N + 1]``: row i, whose entries are what node i reads, is ``indptr[i]:indptr[i + 1]``."""
    indices: Tensor
    """``[E]``: the node that each edge reads from."""
    t_indptr: Tensor
    """``[N + 1]``: the same for the transposed graph (what reads node i)."""
    t_indices: Tensor
    """``[E]``: the node that reads, for each transposed slot."""
    t_edge: Tensor
    """``[E]``: the number of the original edge in each transposed slot."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_index_vector(f"CsrGraph: {field.name}", getattr(self, field.name))
        if self.indptr.numel() == 0 or self.t_indptr.shape != self.indptr.shape:
            raise ValueError(
                "CsrGraph: indptr and t_indptr must both be [N + 1], "
                f"got {self.indptr.numel()} and {self.t_indptr.numel()} entries"
            )
        if not self.indices.shape == self.t_indices.shape == self.t_edge.shape:
            raise ValueError(
                "CsrGraph: indices, t_indices and t_edge must all be [E], got "
                f"{self.indices.numel()}, {self.t_indices.numel()} and {self.t_edge.numel()}"
            )
        if len({tensor.device for tensor in self.tensors()}) != 1:
            raise ValueError("CsrGraph: all tensors must be on one device")

    @property
    def nodes(self) -> int:
        """Number of nodes N."""
        return self.indptr.numel() - 1

    @property
    def edges(self) -> int:
        """Number of edges E."""
        return self.indices.numel()

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.indptr.device

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields in order."""
        return self.indptr, self.indices, self.t_indptr, self.t_indices, self.t_edge

    def to(self, device: torch.device | str) -> CsrGraph:
        """The same graph on another device."""
        return CsrGraph(*(tensor.to(device) for tensor in self.tensors()))

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor) -> CsrGraph:
        """Check a graph in host memory and add its transpose.

        Args:
            indptr: int64 ``[N + 1]``, rising from 0 to E.
            indices: int64 ``[E]`` in ``[0, N)``, in any order within a row; repeats are separate
                edges.

        Raises:
            ValueError: wrong dtype, shape or device.
            NativeError: ``indptr`` falls or does not end at E, or an index is out of range.
        """
        for name, tensor in (("indptr", indptr), ("indices", indices)):
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"CsrGraph.from_csr: {name} must be on the CPU, got {tensor.device}"
                )
        indptr, indices = indptr.contiguous(), indices.contiguous()
        check_index_vector("CsrGraph.from_csr: indptr", indptr)
        check_index_vector("CsrGraph.from_csr: indices", indices)
        if indptr.numel() == 0:
            raise ValueError("CsrGraph.from_csr: indptr must have N + 1 entries, got 0")
        nodes = indptr.numel() - 1
        _C.csr_check(indptr.data_ptr(), indices.data_ptr(), nodes, indices.numel())
        t_indptr, t_indices = torch.empty_like(indptr), torch.empty_like(indices)
        t_edge = torch.empty_like(indices)
        _C.csr_transpose(
            indptr.data_ptr(),
            indices.data_ptr(),
            nodes,
            t_indptr.data_ptr(),
            t_indices.data_ptr(),
            t_edge.data_ptr(),
        )
        return cls(indptr, indices, t_indptr, t_indices, t_edge)


def check_index_vector(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is a contiguous int64 vector."""
    if tensor.dtype != torch.int64 or tensor.ndim != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous int64 vector, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def block_diagonal(graphs: Sequence[CsrGraph]) -> CsrGraph:
    """Concatenate graphs into one without edges between them.

    Node i of graph g becomes node ``i + sum of nodes before g``, and likewise its edges, so node
    features and edge weights are concatenated in the same order.

    Raises:
        ValueError: no graph, or graphs on different devices.
    """
    if not graphs:
        raise ValueError("block_diagonal: graphs must hold at least one graph, got none")
    devices = {graph.device for graph in graphs}
    if len(devices) != 1:
        raise ValueError(f"block_diagonal: graphs must be on one device, got {devices}")
    indptr, t_indptr = [graphs[0].indptr[:1]], [graphs[0].t_indptr[:1]]
    indices, t_indices, t_edge = [], [], []
    nodes = edges = 0
    for graph in graphs:
        indptr.append(graph.indptr[1:] + edges)
        t_indptr.append(graph.t_indptr[1:] + edges)
        indices.append(graph.indices + nodes)
        t_indices.append(graph.t_indices + nodes)
        t_edge.append(graph.t_edge + edges)
        nodes += graph.nodes
        edges += graph.edges
    return CsrGraph(*(torch.cat(parts) for parts in (indptr, indices, t_indptr, t_indices, t_edge)))


def csr_from_edges(
    rows: Tensor, cols: Tensor, values: Tensor, nodes: int
) -> tuple[CsrGraph, Tensor]:
    """Sort edges by (row, column) into a graph of ``nodes`` nodes and its transpose.

    An edge given several times becomes one whose values are added in the order given.

    Args:
        rows: int64 ``[M]`` in ``[0, nodes)``, host memory: the node that reads.
        cols: int64 ``[M]`` in ``[0, nodes)``: the node that is read.
        values: float32 ``[M]``.
        nodes: number of nodes.

    Returns:
        The graph, its indices ascending and unique in each row, and its values ``[E]``, E <= M.
        ``values[graph.t_edge]`` are those of the transpose.

    Raises:
        ValueError: wrong dtypes, shapes or devices, or negative ``nodes``.
        NativeError: a row or column out of range.
    """
    if nodes < 0:
        raise ValueError(f"csr_from_edges: nodes must be at least 0, got {nodes}")
    rows, cols, values = rows.contiguous(), cols.contiguous(), values.detach().contiguous()
    check_index_vector("csr_from_edges: rows", rows)
    check_index_vector("csr_from_edges: cols", cols)
    if values.dtype != torch.float32 or not rows.shape == cols.shape == values.shape:
        raise ValueError(
            "csr_from_edges: rows, cols and values must be [M] with float32 values, got "
            f"{tuple(rows.shape)}, {tuple(cols.shape)} and {values.dtype} {tuple(values.shape)}"
        )
    devices = {tensor.device.type for tensor in (rows, cols, values)}
    if devices != {"cpu"}:
        raise ValueError(f"csr_from_edges: edges must be on the CPU, got {sorted(devices)}")
    indptr = torch.empty(nodes + 1, dtype=torch.int64)
    indices, summed = torch.empty_like(cols), torch.empty_like(values)
    count = _C.csr_from_edges(
        nodes,
        rows.numel(),
        rows.data_ptr(),
        cols.data_ptr(),
        values.data_ptr(),
        indptr.data_ptr(),
        indices.data_ptr(),
        summed.data_ptr(),
    )
    return CsrGraph.from_csr(indptr, indices[:count].clone()), summed[:count].clone()
