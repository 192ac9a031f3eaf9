"""Building the neuron graph from weights, against the same with torch operations."""

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
from onp.ops.neuron_graph import (
    connection_strength,
    connection_strengths,
    similarity_edges,
    similarity_edges_of,
    strongest_edges,
    strongest_edges_of,
)

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
    """The convolutions of three networks; of one if quick, or on a GPU."""
    if device != "cpu":
        yield from rows_on_gpu(repeats if quick else 3 * repeats, ceilings, device)
        return
    for network, shapes in NETWORKS.items():
        if network != next(iter(NETWORKS)) and quick:
            continue
        torch.manual_seed(0)
        weights = [torch.randn(shape) for shape in shapes]
        strengths = [connection_strength(weight) for weight in weights]
        read = seconds_of_a_read(weights, ceilings)
        parts: dict[str, tuple[list[Tensor], dict[str, Callable[[Tensor], Any]]]] = {
            "strengths": (weights, {"onp": connection_strength, "torch": torch_strength}),
            "strongest": (strengths, {"onp": strongest, "torch": torch_strongest}),
            "similar": (strengths, {"onp": similar, "torch": torch_similar_sum}),
        }
        for part, (items, ways) in parts.items():
            expected = all_of(ways["torch"], items)()
            for way, call in ways.items():
                row = Row(KERNEL, f"{network}, {part}", way, "fp32", None, False)
                often = repeats if quick else 3 * repeats
                row = timed(row, all_of(call, items), expected, often, TOLERANCES[part])
                if way == "onp" and row.seconds is not None:
                    row = with_target(row, TARGET, read)
                    if part == "similar":
                        row = with_peak(row, strengths, ceilings)
                yield row


def rows_on_gpu(often: int, ceilings: Ceilings, device: str) -> Iterator[Row]:
    """Each part of all layers of the first network at once, and all parts one after the other."""
    network, shapes = next(iter(NETWORKS.items()))
    torch.manual_seed(0)
    weights = [torch.randn(shape, device=device) for shape in shapes]
    strengths = [torch_strength(weight) for weight in weights]
    read = seconds_of_a_read(weights, ceilings)
    for part, ways in gpu_parts(weights, strengths).items():
        expected = comparable(part, ways["torch"]())
        for way, run in ways.items():
            row = Row(KERNEL, f"{network}, {part}", way, "fp32", None, False)
            tolerance = TOLERANCES.get(part, max(TOLERANCES.values()))
            row = timed(row, partial(found_by, part, run), expected, 1, tolerance)
            if row.correct:
                row = replace(row, seconds=best_time(run, often))
            if way == "onp" and row.seconds is not None:
                row = with_target(row, GPU_TARGET, read)
                if part == "similar":
                    row = with_peak(row, strengths, ceilings)
            yield row


def gpu_parts(
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


def seconds_of_a_read(weights: list[Tensor], ceilings: Ceilings) -> float:
    return sum(weight.numel() for weight in weights) * 4 / 1e9 / ceilings.copy_gbytes


def with_target(row: Row, target: float, read: float) -> Row:
    assert row.seconds is not None
    note = f"{row.seconds / read:.1f} times one read of the weights"
    return replace(row, target=target, note=note)


def with_peak(row: Row, strengths: list[Tensor], ceilings: Ceilings) -> Row:
    """With the share of the peak that similarities take, each pair's once."""
    peak, gflop = ceilings.gflops("fp32"), sum(len(one) ** 2 * one.shape[1] for one in strengths)
    if row.seconds is None or peak is None:
        return row
    return replace(row, share_of_peak=round(gflop / 1e9 / row.seconds / peak, 3))
