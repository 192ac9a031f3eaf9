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
