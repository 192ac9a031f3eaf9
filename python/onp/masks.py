"""The one owner of the mask format (its native twin is ``csrc/core/views.h``).

A mask says which sites are pruned: one bit a site, set = pruned, packed into int64 words (word
``s // 64``, bit ``s % 64``). B masks over S sites are an int64 tensor ``[B, words(S)]``; the
unpacked form is a bool tensor ``[B, S]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 64


def words(sites: int) -> int:
    """Number of int64 words that hold one mask over ``sites`` sites."""
    return (sites + BITS - 1) // BITS


def pack(pruned: Tensor) -> Tensor:
    """Pack bool ``[B, S]`` (True = pruned) into int64 ``[B, words(S)]``; unused bits are 0."""
    if pruned.ndim != 2 or pruned.dtype != torch.bool:
        raise ValueError(
            f"masks.pack: pruned must be bool [B, S], got {pruned.dtype} {tuple(pruned.shape)}"
        )
    batch, sites = pruned.shape
    padded = torch.zeros(batch, words(sites) * BITS, dtype=torch.int64, device=pruned.device)
    padded[:, :sites] = pruned
    shifts = torch.arange(BITS, device=pruned.device)
    return (padded.view(batch, words(sites), BITS) << shifts).sum(-1)


def unpack(packed: Tensor, sites: int) -> Tensor:
    """Unpack int64 ``[B, words(S)]`` into bool ``[B, S]`` (True = pruned)."""
    if packed.ndim != 2 or packed.dtype != torch.int64 or packed.shape[1] != words(sites):
        raise ValueError(
            f"masks.unpack: packed must be int64 [B, {words(sites)}] for {sites} sites, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    shifts = torch.arange(BITS, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :sites].bool()


def heads_of(ranking: Tensor, counts: Sequence[int]) -> Tensor:
    """Masks bool [len(counts), S] that prune the first ``count`` sites of a ranking."""
    order = ranking.argsort(descending=True, stable=True)
    masks = torch.zeros(len(counts), len(ranking), dtype=torch.bool)
    for mask, count in zip(masks, counts, strict=True):
        mask[order[:count]] = True
    return masks
