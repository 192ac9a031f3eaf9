"""Prune the channels whose score stands out in their layer (CLP, BNP)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from bench.defences.api import Info
from bench.defences.common import NormLayer, zero_norms

DEVIATIONS = 3.0
"""Both methods' default: a channel goes beyond the layer's mean + 3 standard deviations."""
SWEEP = tuple(0.5 * step for step in range(21))
"""BackdoorBench's sweep of the number of deviations."""


def outliers(layers: list[NormLayer], scores: Tensor, deviations: float) -> Tensor:
    """bool [U]: scores [U] above mean + ``deviations`` * standard deviation of their layer; a score
    of NaN is one that its layer does without."""
    marked = torch.zeros(len(scores), dtype=torch.bool)
    for layer in layers:
        own = scores[layer.units]
        known = own[~own.isnan()]
        if len(known) > 1:
            marked[layer.units] = own > known.mean() + deviations * known.std()
    return marked


def prune_outliers(
    model: nn.Module, layers: list[NormLayer], scores: Tensor, deviations: float
) -> tuple[nn.Module, Info]:
    """Zero scale and shift of the outliers' norm channels. Candidates: the sweep."""

    def cut(pruned: Tensor) -> nn.Module:
        return zero_norms(model, layers, pruned, shift=True)

    pruned = outliers(layers, scores, deviations)
    info = Info(
        settings={"u": deviations, "pruned": int(pruned.sum()), "units": len(scores)},
    )
    seen: set[bytes] = set()
    for u in SWEEP:
        mask = outliers(layers, scores, u)
        key = mask.numpy().tobytes()
        if key not in seen:
            seen.add(key)
            info.candidates.append((f"u {u:g}", partial(cut, mask)))
    return cut(pruned), info
