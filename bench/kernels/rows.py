"""Rows of the table: one measurement each, its ratio to the best baseline, and its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

OURS = "onp"


@dataclass(frozen=True)
class Row:
    """One implementation on one case."""

    kernel: str
    case: str
    implementation: str
    """``onp`` and its forms begin with ``onp``; all others are baselines."""
    precision: str
    """``fp32``, ``tf32`` or ``reduced``: see ``compared``."""
    seconds: float | None
    """None where the result was wrong: no speed is told of those."""
    correct: bool
    share_of_peak: float | None = None
    target: float | None = None
    """Smallest ratio that is aimed at."""
    ratio_to_best_baseline: float | None = None
    forced: bool = False
    """Not compared: an instruction set was forced, or it does less than the others."""
    note: str = ""
    took: float | None = None
    """Seconds from the row before it: what was made, checked and timed for it, all told."""

    @property
    def ours(self) -> bool:
        return self.implementation.startswith(OURS)


def compared(rows: Sequence[Row]) -> list[Row]:
    """With the ratio of the fastest correct baseline of the same kernel, case and precision over
    each of ours. Reduced precision is compared with fp32 too: where the processor has it in no
    instructions, that is what a user would take."""
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if not row.ours and not row.forced and row.correct and row.seconds is not None:
            rivals = (row.precision, "reduced") if row.precision == "fp32" else (row.precision,)
            for precision in rivals:
                key = (row.kernel, row.case, precision)
                best[key] = min(row.seconds, best.get(key, row.seconds))
    done = []
    for row in rows:
        baseline = best.get((row.kernel, row.case, row.precision))
        if row.ours and not row.forced and row.seconds and baseline is not None:
            row = replace(row, ratio_to_best_baseline=round(baseline / row.seconds, 3))
        done.append(row)
    return done


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| kernel | case | implementation | precision | ms | ratio | target | of peak | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.kernel, row.case, row.implementation, row.precision,
            "–" if row.seconds is None else f"{1e3 * row.seconds:.2f}",
            _number(row.ratio_to_best_baseline), _number(row.target), _number(row.share_of_peak),
            row.note,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
