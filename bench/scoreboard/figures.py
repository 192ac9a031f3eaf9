"""Figures of the scoreboard, as SVG, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.scoreboard.rows import Row
from bench.scoreboard.summary import NO_DEFENCE, Aggregate
from onp.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

_MARKERS = "os^vDPX*<>ph"
_SIZE_INCHES = (7.0, 4.5)


def tradeoff_points(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """(CA drop in points, ASR in percent) of every backdoored row, by defence."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        if not row.oracle and row.ca_drop is not None and row.asr_after is not None:
            points.setdefault(row.defence, []).append((100 * row.ca_drop, 100 * row.asr_after))
    return points


def cost_points(found: Sequence[Aggregate]) -> dict[str, Point]:
    """(mean CPU seconds, mean DER shortfall in points) by defence."""
    points = {}
    for a in found:
        shortfall = a.measures["der_shortfall"]
        if a.defence != NO_DEFENCE and a.cpu_seconds is not None and shortfall is not None:
            points[a.defence] = (a.cpu_seconds, 100 * shortfall.mean)
    return points


def draw_figures(out: Path, rows: Sequence[Row], found: Sequence[Aggregate]) -> list[Path]:
    """Write ``<stem>_tradeoff.svg`` and ``<stem>_cost.svg`` beside ``out``; returns their paths.

    Raises ImportError without matplotlib.
    """
    tradeoff, cost = tradeoff_points(rows), cost_points(found)
    paths = [out.with_name(f"{out.stem}_{name}.svg") for name in ("tradeoff", "cost")]
    _draw(paths[0], lambda axes: _tradeoff(axes, tradeoff))
    _draw(paths[1], lambda axes: _cost(axes, cost))
    return paths


def _tradeoff(axes: Axes, points: dict[str, list[Point]]) -> None:
    for index, (defence, of_defence) in enumerate(points.items()):
        drops, rates = zip(*of_defence, strict=True)
        marker = _MARKERS[index % len(_MARKERS)]
        axes.scatter(drops, rates, marker=marker, color=f"C{index % 10}", label=defence, alpha=0.7)
    axes.set_xlabel("clean accuracy lost (points)")
    axes.set_ylabel("attack success rate after the defence (%)")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    if points:
        axes.legend(fontsize="small")


def _cost(axes: Axes, points: dict[str, Point]) -> None:
    for index, (defence, (seconds, shortfall)) in enumerate(points.items()):
        axes.scatter([max(seconds, 1e-3)], [shortfall], color=f"C{index % 10}")
        axes.annotate(
            defence, (max(seconds, 1e-3), shortfall), xytext=(5, 4), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.margins(x=0.15)  # room for the names
    axes.set_xlabel("CPU seconds (mean, without scoring)")
    axes.set_ylabel("DER shortfall (points, mean)")
    axes.grid(alpha=0.3)


def _draw(path: Path, fill: Callable[[Axes], None]) -> None:
    """One figure; the same points give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        fill(figure.add_subplot())
        write_atomically(
            path, lambda part: figure.savefig(part, format="svg", metadata={"Date": None})
        )
