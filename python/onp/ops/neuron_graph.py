"""What the graph of a network's neurons is made of: connection strengths and chosen edges.

Plain functions over native code; nothing here is differentiable. The plural forms take all layers
of a network at once, which saves a call for each; on CUDA they are as many launches as for one
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from onp import _C
from onp.errors import NotBuiltError


class Edges(NamedTuple):
    """M edges, each once, ordered by (row, column), where the matrix is that they are of."""

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
    return connection_strengths((weight,))[0]


def connection_strengths(weights: Sequence[Tensor]) -> list[Tensor]:
    """:func:`connection_strength` of many layers, all on one device.

    On CUDA the results are views of one tensor, and nothing is waited for.
    """
    weights = _ready("connection_strength", "weight", weights, matrices=False)
    if not weights:
        return []
    layers = [_layer(weight) for weight in weights]
    shapes = [weight.shape[:2] for weight in weights]
    if not weights[0].is_cuda:
        out = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes]
        addresses = [strength.data_ptr() for strength in out]
        _C.connection_strengths(layers, addresses, torch.get_num_threads())
        return out
    starts = [0, *accumulate(pairs for _, pairs, _ in layers)]
    whole = torch.empty(starts[-1], dtype=torch.float32, device=weights[0].device)
    _C.connection_strengths_cuda(*_queue(whole), layers, whole.data_ptr())
    # Meanwhile the kernel runs.
    return [
        whole.as_strided(shape, (shape[1], 1), start)
        for shape, start in zip(shapes, starts, strict=False)
    ]


def _layer(weight: Tensor) -> tuple[int, int, int]:
    """Address, pairs of neurons, floats of each."""
    pairs = weight.shape[0] * weight.shape[1]
    return weight.data_ptr(), pairs, weight.numel() // (pairs or 1)


def strongest_edges(strength: Tensor, k: int) -> Edges:
    """The strongest connections of every neuron of two layers.

    An edge (o, i) is kept if it is among the k strongest of row o or of column i, the lower index
    first among equals. Only strengths above zero make edges (NaN makes none), so a row and a
    column with any positive entry keep at least one edge for k >= 1.

    Args:
        strength: float32 ``[O, I]`` on the CPU or on CUDA.
        k: edges that each row and each column may choose, at least 0.

    Returns:
        The edges on the same device. On CUDA their number is waited for.

    Raises:
        ValueError: wrong dtype, shape, device or k.
        NotBuiltError: a CUDA tensor in a build without CUDA kernels.
    """
    return strongest_edges_of((strength,), k)[0]


def strongest_edges_of(strengths: Sequence[Tensor], k: int) -> list[Edges]:
    """:func:`strongest_edges` of many matrices, all on one device.

    The results are views of one list of edges. On CUDA its length is waited for once.
    """
    strengths = _ready("strongest_edges", "strength", strengths, matrices=True)
    if k < 0:
        raise ValueError(f"strongest_edges: k must be at least 0, got {k}")
    if not strengths:
        return []
    given, k = _addresses(strengths), min(k, _MOST)
    if strengths[0].is_cuda:
        return _selected(_C.EdgeSelection.strongest(given, k), strengths[0])
    return _chosen(_C.EdgeChoice.strongest(given, k, torch.get_num_threads()))


def similarity_edges(vectors: Tensor, threshold: float, max_neighbours: int) -> Edges:
    """Pairs of neurons whose connection strengths point the same way (arXiv 2405.17746).

    A pair r != c with cosine similarity of at least ``threshold`` is kept, in both directions, if
    it is among the ``max_neighbours`` most similar of r or of c (the lower index first among
    equals). A neuron that many others choose can so have more than ``max_neighbours`` edges.
    Vectors that are zero or not finite have no edges.

    Args:
        vectors: float32 ``[N, D]``, one row a neuron, on the CPU or on CUDA.
        threshold: in [-1, 1]; similarities are computed in float32.
        max_neighbours: edges that each neuron may choose, at least 0.

    Returns:
        Edges with their similarities, in [-1, 1], on the same device. Needs about ``4 * N * D +
        2 * N * N`` bytes of scratch memory, on CUDA twice the latter. There similarities are
        summed in another order than on the CPU, and the number of edges is waited for.

    Raises:
        ValueError: wrong dtype, shape, device, threshold or max_neighbours.
        NotBuiltError: a CUDA tensor in a build without CUDA kernels.
    """
    return similarity_edges_of((vectors,), threshold, max_neighbours)[0]


def similarity_edges_of(
    vectors: Sequence[Tensor], threshold: float, max_neighbours: int
) -> list[Edges]:
    """:func:`similarity_edges` of many matrices, all on one device.

    The results are views of one list of edges. On CUDA its length is waited for once, and the
    scratch memory is that of all matrices together: of each its similarities and a copy, with N
    rounded up to 64 and D to 16.
    """
    vectors = _ready("similarity_edges", "vectors", vectors, matrices=True)
    if not -1 <= threshold <= 1:
        raise ValueError(f"similarity_edges: threshold must be in [-1, 1], got {threshold}")
    if max_neighbours < 0:
        raise ValueError(
            f"similarity_edges: max_neighbours must be at least 0, got {max_neighbours}"
        )
    if not vectors:
        return []
    given, most = _addresses(vectors), min(max_neighbours, _MOST)
    if vectors[0].is_cuda:
        return _selected(_C.EdgeSelection.similar(given, threshold, most), vectors[0])
    return _chosen(_C.EdgeChoice.similar(given, threshold, most, torch.get_num_threads()))


# ---- room for what is chosen

_MOST = 1 << 30
"""Rows or columns that the kernels take: to choose more is to choose all."""


def _queue(tensor: Tensor) -> tuple[int, int]:
    """The number of a tensor's device, and torch's stream there."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _addresses(matrices: list[Tensor]) -> list[tuple[int, int, int]]:
    return [(matrix.data_ptr(), *matrix.shape) for matrix in matrices]


def _selected(selection: _C.EdgeSelection, given: Tensor) -> list[Edges]:
    """The edges, on the device of ``given``."""
    queue, device = _queue(given), given.device
    scratch = torch.empty(selection.scratch_bytes, dtype=torch.uint8, device=device)
    bounds = selection.choose(*queue, scratch.data_ptr())
    edges, addresses = _room(bounds[-1], device)
    selection.write(*queue, scratch.data_ptr(), *addresses)
    return _split(edges, bounds)


def _chosen(choice: _C.EdgeChoice) -> list[Edges]:
    """The edges, on the CPU."""
    bounds = choice.bounds
    edges, addresses = _room(bounds[-1], torch.device("cpu"))
    choice.write(*addresses, torch.get_num_threads())
    return _split(edges, bounds)


def _room(count: int, device: torch.device) -> tuple[Edges, tuple[int, int, int]]:
    """For ``count`` edges, and its addresses."""
    rows, cols = torch.empty((2, count), dtype=torch.int64, device=device).unbind()
    values = torch.empty(count, dtype=torch.float32, device=device)
    return Edges(rows, cols, values), (rows.data_ptr(), cols.data_ptr(), values.data_ptr())


def _split(edges: Edges, bounds: list[int]) -> list[Edges]:
    sizes = [end - begin for begin, end in pairwise(bounds)]
    return list(map(Edges, *(part.split_with_sizes(sizes) for part in edges)))


# ---- arguments


def _ready(op: str, name: str, tensors: Sequence[Tensor], *, matrices: bool) -> list[Tensor]:
    """The tensors, contiguous, after a check of what all these functions ask for; it is short, as
    for small layers it takes longer than the kernels."""
    ready = []
    device = tensors[0].get_device() if tensors else -1
    for tensor in tensors:
        dims, on_cuda = tensor.ndim, tensor.is_cuda
        if (
            tensor.dtype != torch.float32
            or dims < 2
            or (matrices and dims > 2)
            or not (on_cuda or tensor.is_cpu)
        ):
            raise ValueError(
                f"{op}: {name} must be {'a float32 matrix' if matrices else 'float32 [O, I, *K]'} "
                f"on the CPU or on CUDA, got {tensor.dtype} {tuple(tensor.shape)} "
                f"on {tensor.device}"
            )
        if on_cuda and not _C.with_cuda:
            raise NotBuiltError(
                f"{op}: onp was built without CUDA kernels: reinstall with "
                "-C cmake.define.ONP_CUDA=ON, or move the tensor to the CPU"
            )
        if tensor.get_device() != device:
            raise ValueError(
                f"{op}: {name} must all be on one device, "
                f"got {tensors[0].device} and {tensor.device}"
            )
        ready.append(tensor if tensor.is_contiguous() else tensor.detach().contiguous())
    return ready
