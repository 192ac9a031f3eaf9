"""Triton kernels of message passing: fp32 or bf16 storage, fp32 sums, no atomics.

Imported when a call needs it, never for native work. Under ``TRITON_INTERPRET=1``, which must be
set before this module is imported, the kernels run on CPU tensors without a driver; the autotuner
would ask for one, so each list of configurations is then cut to its first.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# ROWS nodes are summed side by side; EDGES neighbours of each are loaded before they are used.
SUM_CONFIGS = [
    triton.Config({"ROWS": 8, "EDGES": 4}, num_warps=2),
    triton.Config({"ROWS": 8, "EDGES": 4}, num_warps=1),
    triton.Config({"ROWS": 4, "EDGES": 8}, num_warps=1),
    triton.Config({"ROWS": 4, "EDGES": 4}, num_warps=1),
]
MOST_FEATURES = 64
"""Of one program of a sum."""

# EDGES is the number of neighbours gathered at a time, FEATURES the width of a tile.
CONFIGS = [
    triton.Config({"EDGES": 8, "FEATURES": 64}, num_warps=2),
    triton.Config({"EDGES": 4, "FEATURES": 32}, num_warps=1),
    triton.Config({"EDGES": 16, "FEATURES": 32}, num_warps=2),
    triton.Config({"EDGES": 16, "FEATURES": 128}, num_warps=4),
]


def _tuned(configs: list[triton.Config]) -> list[triton.Config]:
    return configs[:1] if INTERPRETED else configs


@triton.autotune(configs=_tuned(SUM_CONFIGS), key=["features"])
@triton.jit
def sum_kernel(
    x,  # [B, N, D]
    weight,  # [E]
    indptr,  # [N + 1]
    indices,  # [E]
    out,  # [B, N, D]
    nodes,
    features,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    EDGES: tl.constexpr,
):
    """One program: FEATURES features of ROWS nodes of one batch entry. No thread needs another's
    sum; rows that have fewer neighbours than others of the program load nothing for the rest."""
    groups = tl.cdiv(nodes, ROWS)
    entry = (tl.program_id(0) // groups).to(tl.int64) * nodes
    row = tl.program_id(0) % groups * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    in_features = feature < features
    begin = tl.load(indptr + row, mask=row < nodes, other=0)
    end = tl.load(indptr + row + 1, mask=row < nodes, other=0)
    total = tl.zeros([ROWS, FEATURES], dtype=tl.float32)
    for first in range(0, tl.max(end - begin, axis=0), EDGES):
        for ahead in tl.static_range(EDGES):
            edge = begin + (first + ahead)
            in_row = edge < end
            neighbour = tl.load(indices + edge, mask=in_row, other=0)
            scale = tl.load(weight + edge, mask=in_row, other=0.0).to(tl.float32)
            tile = tl.load(
                x + (entry + neighbour)[:, None] * features + feature[None, :],
                mask=in_row[:, None] & in_features[None, :],
                other=0.0,
            ).to(tl.float32)
            total += tile * scale[:, None]
    tl.store(
        out + (entry + row)[:, None] * features + feature[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < nodes)[:, None] & in_features[None, :],
    )


@triton.autotune(configs=_tuned(CONFIGS), key=["features", "batch"])
@triton.jit
def weight_grad_kernel(
    grad,  # [B, N, D]
    x,  # [B, N, D]
    indptr,  # [N + 1]
    indices,  # [E]
    weight_grad,  # [E]
    batch,
    batch_stride,
    features,
    EDGES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program: every edge of one row, summed over the batch and the features."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr + row)
    end = tl.load(indptr + row + 1)
    for first in range(begin, end, EDGES):
        edge = first + tl.arange(0, EDGES)
        in_row = edge < end
        neighbour = tl.load(indices + edge, mask=in_row, other=0)
        total = tl.zeros([EDGES], dtype=tl.float32)
        entry_start = row - row
        for _ in range(0, batch):
            for start in range(0, features, FEATURES):
                feature = start + tl.arange(0, FEATURES)
                in_features = feature < features
                own = tl.load(
                    grad + entry_start + row * features + feature, mask=in_features, other=0.0
                ).to(tl.float32)
                tile = tl.load(
                    x + entry_start + neighbour[:, None] * features + feature[None, :],
                    mask=in_row[:, None] & in_features[None, :],
                    other=0.0,
                ).to(tl.float32)
                total += tl.sum(tile * own[None, :], axis=1)
            entry_start += batch_stride
        tl.store(weight_grad + edge, total.to(weight_grad.dtype.element_ty), mask=in_row)


def launch_sum(x: Tensor, weight: Tensor, indptr: Tensor, indices: Tensor, out: Tensor) -> None:
    """Fill ``out[b, i]`` with the weighted sum of row i's neighbours; contiguous tensors."""
    _check_device(x)
    batch, nodes, features = x.shape
    if out.numel():
        tile = min(MOST_FEATURES, triton.next_power_of_2(features))
        with torch.cuda.device_of(x):  # Triton launches on the current one
            sum_kernel[
                lambda meta: (batch * triton.cdiv(nodes, meta["ROWS"]), triton.cdiv(features, tile))
            ](x, weight, indptr, indices, out, nodes, features, FEATURES=tile)


def launch_weight_grad(
    grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor, weight_grad: Tensor
) -> None:
    """Fill ``weight_grad[e]`` with the dot product of its two ends; contiguous tensors."""
    _check_device(x)
    batch, nodes, features = x.shape
    if weight_grad.numel():
        with torch.cuda.device_of(x):
            weight_grad_kernel[(nodes,)](
                grad, x, indptr, indices, weight_grad, batch, nodes * features, features
            )


def _check_device(x: Tensor) -> None:
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(
            "message_passing: Triton kernels need CUDA tensors "
            f"(or TRITON_INTERPRET=1 before the first call), got {x.device}"
        )
