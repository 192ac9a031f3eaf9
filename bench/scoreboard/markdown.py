"""The summary as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from bench.defences.known_trigger import KNOWN_TRIGGER
from bench.scoreboard.leaderboard import PublicMean
from bench.scoreboard.rows import Row
from bench.scoreboard.summary import NO_DEFENCE, Aggregate, Spread, Summary

_NAMES = {
    "ca_drop": "CA drop",
    "asr_after": "ASR",
    "excess_asr": "excess ASR",
    "ra_after": "RA",
    "der": "DER",
    "der_shortfall": "DER shortfall",
}

_LEGEND = """\
CA drop, ASR, excess ASR (over the clean twin's rate on the same images), RA and DER are in percent
(points), over backdoored networks. DER = [max(0, ASR before - after) - max(0, CA before - after) +
1] / 2; its shortfall is what is missing to ASR 0 with no accuracy lost, "behind" what is missing to
the best mask that the package's own search finds when it is told the trigger. A: share with ASR <
10% and CA drop < 5 points. B: share with excess ASR < 1 point and CA drop < 1 point. Seconds (wall
clock; of a shared machine, where jobs is more than 1), CPU seconds (all threads) and
image-forwards are means, memory is the largest; none of them holds scoring."""

_INCOMPLETE = "†: rows are missing, so these means are not comparable with complete ones."


def tables(summary: Summary) -> str:
    """The main table, the spread of each measure, the oracle's, the groups and every network."""
    parts = [main_table(summary.defences), _LEGEND]
    everything = [
        *summary.defences, *summary.oracle,
        *(a for field in summary.groups.values() for found in field.values() for a in found),
    ]  # fmt: skip
    if not all(found.complete for found in everything):
        parts.append(_INCOMPLETE)
    parts += ["### Median / worst", _spreads(summary.defences, _median_and_worst)]
    if len(summary.seeds) > 1:
        parts += ["### Standard deviation of the means of single seeds"]
        parts += [_spreads(summary.defences, lambda spread: _percent(spread.seed_std))]
    if summary.oracle:
        parts += ["### Oracle: a setting picked with the true trigger, or told of the attack"]
        parts += [main_table(summary.oracle)]
    for field, values in summary.groups.items():
        for value, found in values.items():
            parts += [f"### {field}: {value}", main_table(found)]
    parts += ["### Every network: CA / ASR in percent", _models(summary)]
    return "\n\n".join(parts) + "\n"


def main_table(found: Sequence[Aggregate]) -> str:
    """One line a defence; means over backdoored networks, and what clean ones lose."""
    head = (
        "defence", "seeds", "rows", *_NAMES.values(), "behind", "A", "B", "clean nets: mean drop",
        "largest", "seconds", "CPU s", "image-forwards", "MB", "errors", "n/a",
    )  # fmt: skip
    lines = []
    for a in found:
        spreads = [a.measures[name] for name in _NAMES]
        lines.append(
            (
                a.defence + ("" if a.complete else " †"),
                str(a.seeds),
                f"{a.scored}/{a.expected}",
                *(_percent(spread.mean if spread else None) for spread in spreads),
                _percent(a.behind),
                _percent(a.repaired, 0),
                _percent(a.traceless, 0),
                _percent(a.clean_drop_mean),
                _percent(a.clean_drop_max),
                _number(a.seconds, 1),
                _number(a.cpu_seconds, 1),
                _number(a.image_forwards),
                _number(a.peak_memory_mb),
                str(a.errors),
                str(a.not_applicable),
            )
        )
    return table(head, lines)


def public_table(means: Sequence[PublicMean]) -> str:
    """BackdoorBench's own means."""
    head = ("defence", "cases", "CA drop", "ASR", "DER", "A")
    lines = [
        (m.defence, str(m.cases), *map(_percent, (m.ca_drop, m.asr_after, m.der)),
         _percent(m.repaired, 0))
        for m in means
    ]  # fmt: skip
    return table(head, lines)


def environment(rows: Sequence[Row]) -> str:
    """What the rows were measured with; more than one value where they differ."""
    lines = []
    names = ("commit", "onp", "torch", "threads", "jobs", "cpu", "test_images", "oracle_images")
    for name in names:
        values = dict.fromkeys(str(v) for row in rows if (v := getattr(row, name)) is not None)
        lines.append(f"- {name.replace('_', ' ')}: {', '.join(values) or '–'}")
    return "\n".join(lines)


def left_out(reasons: Mapping[str, str]) -> str:
    """The networks that are left out, and why."""
    return "\n".join(f"- {name}: {reason}" for name, reason in reasons.items())


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _spreads(found: Sequence[Aggregate], cell: Callable[[Spread], str]) -> str:
    lines = []
    for a in found:
        if a.defence != NO_DEFENCE:
            spreads = [a.measures[name] for name in _NAMES]
            lines.append((a.defence, *(cell(s) if s else "–" for s in spreads)))
    return table(("defence", *_NAMES.values()), lines)


def _median_and_worst(spread: Spread) -> str:
    return f"{_percent(spread.median)} / {_percent(spread.worst)}"


def _models(summary: Summary) -> str:
    """A line a network, a column a defence; means over seeds."""
    defences = [found.defence for found in summary.defences if found.defence != NO_DEFENCE]
    lines = []
    for name, rows in summary.models.items():
        if not rows:
            lines.append((name, "–", "–", "–", *("–" for _ in defences)))
            continue
        first = rows[0]
        before = _pair(first.ca_before, first.asr_before)
        cells = [_cell([row for row in rows if row.defence == defence]) for defence in defences]
        told = summary.known.get(name)
        ceiling = "–" if told is None else _cell([told])
        lines.append((name, before, _percent(first.asr_clean_twin), ceiling, *cells))
    return table(("network", "before", "twin's ASR", KNOWN_TRIGGER, *defences), lines)


def _cell(rows: Sequence[Row]) -> str:
    accuracies = [row.ca_after for row in rows if row.ca_after is not None]
    if accuracies:
        rates = [row.asr_after for row in rows if row.asr_after is not None]
        return _pair(fmean(accuracies), fmean(rates) if rates else None)
    if any(row.error is not None for row in rows):
        return "error"
    return "n/a" if rows else "–"


def _pair(ca: float | None, asr: float | None) -> str:
    return _percent(ca) if asr is None else f"{_percent(ca)} / {_percent(asr)}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
