"""The correctness gate of the small kernels: results are compared before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from bench.kernels.peak import best_time
from bench.kernels.rows import Row

TOLERANCE = 1e-4
"""Of the largest value expected."""


def timed(
    row: Row,
    run: Callable[[], Sequence[Tensor]],
    expected: Sequence[Tensor],
    repeats: int,
    tolerance: float = TOLERANCE,
    *,
    by_norm: bool = False,
) -> Row:
    """The row with its seconds, if ``run`` gives what is expected: up to a share of the largest
    value, or of the norm, which single values that are far off hardly move."""
    try:
        found = run()
    except Exception as error:
        return replace(row, note=f"did not run: {type(error).__name__}: {error}"[:200])
    for got, want in zip(found, expected, strict=True):
        if got.shape != want.shape:
            return replace(row, note=f"shape {tuple(got.shape)} for {tuple(want.shape)}")
        if want.numel() == 0:
            continue
        gap, scale = got.double() - want.double(), want.double()
        off, size = (
            (float(gap.norm()), float(scale.norm()))
            if by_norm
            else (float(gap.abs().max()), float(scale.abs().max()))
        )
        if not off <= tolerance * size:
            return replace(row, note=f"off by {off / size:.2g} of the expected")
    return replace(row, seconds=best_time(run, repeats), correct=True)
