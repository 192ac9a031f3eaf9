"""Building the neuron graph from weights, against the same with torch operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.bench_neuron_graph import (
    NEIGHBOURS,
    NETWORKS,
    THRESHOLD,
    torch_similar,
    torch_strength,
    torch_strongest,
)
from bench.kernels.gate import timed
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row
from onp.ops.neuron_graph import connection_strength, similarity_edges, strongest_edges

KERNEL = "neuron_graph"
TARGET = 3.0
GPU_TARGET = 5.0
TOLERANCES = {"strengths": 1e-4, "strongest": 1e-4, "similar": 2e-3}
"""Of similarities, which are summed, more: rounding decides which edges are at the threshold."""


def strongest(strength: Tensor) -> tuple[Tensor, ...]:
    return strongest_edges(strength, NEIGHBOURS)


def similar(vectors: Tensor) -> Tensor:
    """The sum of the similarities."""
    return similarity_edges(vectors, THRESHOLD, NEIGHBOURS)[2].sum()


def torch_similar_sum(vectors: Tensor) -> Tensor:
    return torch_similar(vectors)[2].sum()


def all_of(call: Callable[[Tensor], Any], items: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A run over all layers; its results one after the other."""

    def run() -> list[Tensor]:
        found = [call(item) for item in items]
        return [part for one in found for part in (one if isinstance(one, tuple) else (one,))]

    return run


def rows(quick: bool, repeats: int, ceilings: Ceilings, device: str = "cpu") -> Iterator[Row]:
    """The convolutions of three networks; of one if quick. On a GPU strengths alone."""
    for network, shapes in NETWORKS.items():
        if network != next(iter(NETWORKS)) and (quick or device != "cpu"):
            continue
        torch.manual_seed(0)
        weights = [torch.randn(shape).to(device) for shape in shapes]
        strengths = [connection_strength(weight) for weight in weights]
        read = sum(weight.numel() for weight in weights) * 4 / 1e9 / ceilings.copy_gbytes
        gflop = sum(len(one) ** 2 * one.shape[1] for one in strengths) / 1e9  # each pair once
        parts: dict[str, tuple[list[Tensor], dict[str, Callable[[Tensor], Any]]]] = {
            "strengths": (weights, {"onp": connection_strength, "torch": torch_strength}),
            "strongest": (strengths, {"onp": strongest, "torch": torch_strongest}),
            "similar": (strengths, {"onp": similar, "torch": torch_similar_sum}),
        }
        for part, (items, ways) in parts.items():
            if device != "cpu" and part != "strengths":
                continue
            expected = all_of(ways["torch"], items)()
            for way, call in ways.items():
                row = Row(KERNEL, f"{network}, {part}", way, "fp32", None, False)
                often = repeats if quick else 3 * repeats
                row = timed(row, all_of(call, items), expected, often, TOLERANCES[part])
                if way == "onp" and row.seconds is not None:
                    note = f"{row.seconds / read:.1f} times one read of the weights"
                    target = TARGET if device == "cpu" else GPU_TARGET
                    row = replace(row, target=target, note=note)
                    peak = ceilings.gflops("fp32")
                    if part == "similar" and peak is not None:
                        row = replace(row, share_of_peak=round(gflop / row.seconds / peak, 3))
                yield row
