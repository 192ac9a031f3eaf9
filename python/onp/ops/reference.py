"""Naive twins of every native operation: obvious, slow, and importing torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

# ---- message passing ----------------------------------------------------------------------------


def csr_rows(indptr: Tensor) -> Tensor:
    """The row of every edge, ``[E]``, of a CSR graph with ``indptr [N + 1]``."""
    nodes = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(nodes, indptr.diff())


def message_passing(x: Tensor, weight: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """``[B, N, D]``: for each row the sum of ``weight[e] * x[b, indices[e]]`` over its edges."""
    messages = weight[:, None] * x[:, indices]
    return torch.zeros_like(x).index_add(1, csr_rows(indptr), messages)


def csr_transpose(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(t_indptr, t_indices, t_edge)`` of a CSR graph, rows in ascending order."""
    t_edge = torch.argsort(indices, stable=True)
    counts = torch.bincount(indices, minlength=indptr.numel() - 1)
    t_indptr = torch.cat([indptr[:1], counts.cumsum(0)])
    return t_indptr, csr_rows(indptr)[t_edge], t_edge


# ---- neuron graph -------------------------------------------------------------------------------

# ---- masked forward -----------------------------------------------------------------------------
