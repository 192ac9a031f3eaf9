"""Building the neuron graph from weights, against the same with torch operations.

Each part of all layers of a network at once, as the graph is built, and all parts one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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
from bench.kernels.peak import Ceilings, best_time
from bench.kernels.rows import Row
from onp.ops.neuron_graph import connection_strengths, similarity_edges_of, strongest_edges_of

KERNEL = "neuron_graph"
TARGET = 3.0
GPU_TARGET = 5.0
TOLERANCES = {"strengths": 1e-4, "strongest": 1e-4}
TOLERANCE_OF_SUMS = 2e-3
"""Of similarities, which are summed: rounding decides which edges are at the threshold."""


def rows(quick: bool, repeats: int, ceilings: Ceilings, device: str = "cpu") -> Iterator[Row]:
    """The convolutions of three networks; of one if quick, or on a GPU."""
    for network, shapes in NETWORKS.items():
        if network != next(iter(NETWORKS)) and (quick or device != "cpu"):
            continue
        torch.manual_seed(0)
        weights = [torch.randn(shape, device=device) for shape in shapes]
        strengths = [torch_strength(weight) for weight in weights]
        read = sum(weight.numel() for weight in weights) * 4 / 1e9 / ceilings.copy_gbytes
        target = TARGET if device == "cpu" else GPU_TARGET
        for part, ways in parts_of(weights, strengths).items():
            expected = comparable(part, ways["torch"]())
            for way, run in ways.items():
                row = Row(KERNEL, f"{network}, {part}", way, "fp32", None, False)
                tolerance = TOLERANCES.get(part, TOLERANCE_OF_SUMS)
                row = timed(row, partial(found_by, part, run), expected, 1, tolerance)
                if row.correct:
                    row = replace(row, seconds=best_time(run, repeats if quick else 3 * repeats))
                if way == "onp" and row.seconds is not None:
                    note = f"{row.seconds / read:.1f} times one read of the weights"
                    row = replace(row, target=target, note=note)
                    if part == "similar":
                        row = with_peak(row, strengths, ceilings)
                yield row


def parts_of(
    weights: list[Tensor], strengths: list[Tensor]
) -> dict[str, dict[str, Callable[[], list[Any]]]]:
    """What is run, by part and implementation; each gives a list of all layers."""

    def ours() -> list[Any]:
        found = connection_strengths(weights)
        edges = strongest_edges_of(found, NEIGHBOURS)
        return [*found, *edges, *similarity_edges_of(found, THRESHOLD, NEIGHBOURS)]

    def of_torch() -> list[Any]:
        found = [torch_strength(weight) for weight in weights]
        edges = [torch_strongest(one) for one in found]
        return [*found, *edges, *map(torch_similar, found)]

    return {
        "strengths": {
            "onp": lambda: connection_strengths(weights),
            "torch": lambda: [torch_strength(weight) for weight in weights],
        },
        "strongest": {
            "onp": lambda: strongest_edges_of(strengths, NEIGHBOURS),
            "torch": lambda: [torch_strongest(one) for one in strengths],
        },
        "similar": {
            "onp": lambda: similarity_edges_of(strengths, THRESHOLD, NEIGHBOURS),
            "torch": lambda: [torch_similar(one) for one in strengths],
        },
        "all": {"onp": ours, "torch": of_torch},
    }


def found_by(part: str, run: Callable[[], list[Any]]) -> list[Tensor]:
    return comparable(part, run())


def comparable(part: str, found: list[Any]) -> list[Tensor]:
    """What of a part's results has to agree: of edges that rounding may choose, the sum alone."""
    if part == "strengths":
        return found
    if part == "strongest":
        return [tensor for edges in found for tensor in edges]
    if part == "similar":
        return [values.sum() for _, _, values in found]
    layers = len(found) // 3
    strengths, edges = found[:layers], [*found[layers:]]
    return [*strengths, *comparable("similar", edges)]


def with_peak(row: Row, strengths: list[Tensor], ceilings: Ceilings) -> Row:
    """With the share of the peak that similarities take, each pair's once."""
    peak, gflop = ceilings.gflops("fp32"), sum(len(one) ** 2 * one.shape[1] for one in strengths)
    if row.seconds is None or peak is None:
        return row
    return replace(row, share_of_peak=round(gflop / 1e9 / row.seconds / peak, 3))
