"""What the graph of a network's neurons is made of: connection strengths and chosen edges.

Plain functions over native code; nothing here is differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onp import _C
from onp.errors import NotBuiltError


class Edges(NamedTuple):
    """M edges in host memory, each once, ordered by (row, column)."""

    rows: Tensor
    """int64 ``[M]``."""
    cols: Tensor
    """int64 ``[M]``."""
    values: Tensor
    """float32 ``[M]``."""


def connection_strength(weight: Tensor) -> Tensor:
    """L1 norm of the weights between every two neurons (arXiv 2405.17746).

    Args:
        weight: float32 ``[O, I, *K]`` of a convolution or linear layer, on the CPU or on CUDA.

    Returns:
        float32 ``[O, I]`` on the same device, the sum of ``|weight[o, i]|`` over the kernel; CUDA
        work is queued on torch's current stream.

    Raises:
        ValueError: wrong dtype, fewer than two dimensions, or another kind of device.
        NotBuiltError: a CUDA tensor in a build without CUDA kernels.
    """
    if weight.dtype != torch.float32 or weight.ndim < 2:
        raise ValueError(
            "connection_strength: weight must be float32 [O, I, *K], "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"connection_strength: weight must be on the CPU or on CUDA, got {weight.device}"
        )
    if weight.is_cuda and not _C.with_cuda:
        raise NotBuiltError(
            "connection_strength: onp was built without CUDA kernels: reinstall with "
            "-C cmake.define.ONP_CUDA=ON, or move the tensor to the CPU"
        )
    weight = weight.detach().contiguous()
    out = torch.empty(weight.shape[:2], dtype=weight.dtype, device=weight.device)
    pairs, kernel = out.numel(), weight.shape[2:].numel()
    if weight.is_cuda:
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        _C.connection_strength_cuda(
            weight.get_device(), stream, weight.data_ptr(), pairs, kernel, out.data_ptr()
        )
    else:
        _C.connection_strength(
            weight.data_ptr(), pairs, kernel, out.data_ptr(), torch.get_num_threads()
        )
    return out


def strongest_edges(strength: Tensor, k: int) -> Edges:
    """The strongest connections of every neuron of two layers.

    An edge (o, i) is kept if it is among the k strongest of row o or of column i, the lower index
    first among equals. Only strengths above zero make edges (NaN makes none), so a row and a
    column with any positive entry keep at least one edge for k >= 1.

    Args:
        strength: float32 ``[O, I]`` in host memory.
        k: edges that each row and each column may choose, at least 0.

    Raises:
        ValueError: wrong dtype, shape, device or k.
    """
    _check_matrix("strongest_edges", "strength", strength)
    if k < 0:
        raise ValueError(f"strongest_edges: k must be at least 0, got {k}")
    strength = strength.detach().contiguous()
    rows, cols = strength.shape
    k = min(k, max(rows, cols))
    capacity = min(rows * cols, rows * min(k, cols) + cols * min(k, rows))
    edges = _empty_edges(capacity)
    count = _C.strongest_edges(
        strength.data_ptr(),
        rows,
        cols,
        k,
        edges.rows.data_ptr(),
        edges.cols.data_ptr(),
        edges.values.data_ptr(),
        capacity,
        torch.get_num_threads(),
    )
    return Edges(*(tensor[:count].clone() for tensor in edges))


def similarity_edges(vectors: Tensor, threshold: float, max_neighbours: int) -> Edges:
    """Pairs of neurons whose connection strengths point the same way (arXiv 2405.17746).

    A pair r != c with cosine similarity of at least ``threshold`` is kept, in both directions, if
    it is among the ``max_neighbours`` most similar of r or of c (the lower index first among
    equals). A neuron that many others choose can so have more than ``max_neighbours`` edges.
    Vectors that are zero or not finite have no edges.

    Args:
        vectors: float32 ``[N, D]`` in host memory, one row a neuron.
        threshold: in [-1, 1]; similarities are computed in float32.
        max_neighbours: edges that each neuron may choose, at least 0.

    Returns:
        Edges with their similarities, in [-1, 1]. Needs ``5 * N * N`` bytes of scratch memory.

    Raises:
        ValueError: wrong dtype, shape, device, threshold or max_neighbours.
    """
    _check_matrix("similarity_edges", "vectors", vectors)
    if not -1 <= threshold <= 1:
        raise ValueError(f"similarity_edges: threshold must be in [-1, 1], got {threshold}")
    if max_neighbours < 0:
        raise ValueError(
            f"similarity_edges: max_neighbours must be at least 0, got {max_neighbours}"
        )
    vectors = vectors.detach().contiguous()
    nodes, size = vectors.shape
    max_neighbours = min(max_neighbours, nodes)
    capacity = nodes * min(2 * max_neighbours, nodes)
    edges = _empty_edges(capacity)
    count = _C.similarity_edges(
        vectors.data_ptr(),
        nodes,
        size,
        threshold,
        max_neighbours,
        edges.rows.data_ptr(),
        edges.cols.data_ptr(),
        edges.values.data_ptr(),
        capacity,
        torch.get_num_threads(),
    )
    return Edges(*(tensor[:count].clone() for tensor in edges))


def _check_matrix(op: str, name: str, matrix: Tensor) -> None:
    if matrix.dtype != torch.float32 or matrix.ndim != 2 or matrix.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} must be a float32 matrix on the CPU, "
            f"got {matrix.dtype} {tuple(matrix.shape)} on {matrix.device}"
        )


def _empty_edges(capacity: int) -> Edges:
    return Edges(
        torch.empty(capacity, dtype=torch.int64),
        torch.empty(capacity, dtype=torch.int64),
        torch.empty(capacity, dtype=torch.float32),
    )
