"""Means, worst cases and shares over the rows of each defence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev
from typing import Any

from bench.defences.known_trigger import KNOWN_TRIGGER
from bench.scoreboard.rows import Row

MEASURES: dict[str, Callable[[Sequence[float]], float]] = {
    "ca_drop": max,
    "asr_after": max,
    "excess_asr": max,
    "ra_after": min,
    "der": min,
    "der_shortfall": max,
}
"""Fields of a row that are averaged over backdoored networks, and which end of each is worst."""

NO_DEFENCE = "(none)"

REPAIRED_ASR, REPAIRED_DROP = 0.10, 0.05
"""BackdoorBench's usual rule: below both, the defence worked."""

TRACELESS = 0.01
"""Below it in excess ASR and in accuracy lost, nothing of backdoor or repair is left to see."""


@dataclass(frozen=True)
class Spread:
    """A measure over the backdoored rows of one defence."""

    mean: float
    median: float
    worst: float
    seed_std: float | None
    """Standard deviation of the means of single seeds; None for fewer than two seeds."""


@dataclass(frozen=True)
class Aggregate:
    """One defence over a group of networks. None: no row defines it."""

    defence: str
    seeds: int
    """How many the defence has rows of."""
    expected: int
    """Networks times these seeds."""
    scored: int
    errors: int
    not_applicable: int
    complete: bool
    """Every network has scores with each of these seeds: only complete aggregates of a group are
    comparable."""
    backdoored: int
    measures: dict[str, Spread | None]
    behind: float | None
    """Mean of how far DER is behind the search's that knows the trigger, where there is such a row;
    negative where it found less."""
    repaired: float | None
    """Share of backdoored rows with ASR < 10% and less than 5 points of accuracy lost."""
    traceless: float | None
    """Share with less than 1 point of excess ASR and less than 1 point of accuracy lost."""
    clean: int
    clean_drop_mean: float | None
    clean_drop_max: float | None
    seconds: float | None
    """Mean, over all scored rows; as are cpu_seconds and image_forwards."""
    cpu_seconds: float | None
    image_forwards: float | None
    peak_memory_mb: float | None
    """Largest."""


@dataclass(frozen=True)
class Summary:
    """Everything that is printed about a set of rows."""

    defences: list[Aggregate]
    """The one with no defence first, then by DER shortfall."""
    oracle: list[Aggregate]
    """Picked with the true trigger; over backdoored networks alone."""
    groups: dict[str, dict[str, list[Aggregate]]]
    """By a field of the card (dataset, arch, attack), then by its value."""
    models: dict[str, list[Row]]
    """Rows by network, without the oracle's."""
    known: dict[str, Row]
    """By network, the best row of the search that knows the trigger."""
    expected: list[str]
    """Names of the networks."""
    seeds: list[int]


def summarise(
    rows: Sequence[Row], cards: Sequence[Mapping[str, Any]], seeds: Sequence[int], by: Sequence[str]
) -> Summary:
    """``rows`` of the networks of ``cards`` and of ``seeds``; others must not be among them."""
    main = [row for row in rows if not row.oracle]
    oracle = [row for row in rows if row.oracle]
    known = best_known(oracle)
    backdoored = [card for card in cards if card["attack"] != "clean"]
    groups: dict[str, dict[str, list[Aggregate]]] = {}
    for field in by:
        values = dict.fromkeys(str(card[field]) for card in cards)
        groups[field] = {
            value: aggregates(
                [row for row in main if str(getattr(row, field)) == value],
                sum(str(card[field]) == value for card in cards),
                known,
            )
            for value in values
        }
    names = [str(card["name"]) for card in cards]
    return Summary(
        defences=aggregates(main, len(cards), known),
        oracle=aggregates(oracle, len(backdoored), known)[1:],
        groups=groups,
        models={name: [row for row in main if row.model == name] for name in names},
        known=known,
        expected=names,
        seeds=list(seeds),
    )


def best_known(oracle: Sequence[Row]) -> dict[str, Row]:
    """By network, the row of highest DER of the search that knows the trigger."""
    best: dict[str, Row] = {}
    for row in oracle:
        if row.defence == KNOWN_TRIGGER and row.der is not None:
            other = best.get(row.model)
            if other is None or row.der > (other.der or 0.0):
                best[row.model] = row
    return best


def aggregates(
    rows: Sequence[Row], networks: int, known: Mapping[str, Row] | None = None
) -> list[Aggregate]:
    """No defence first, as a yardstick, then every defence, the smallest DER shortfall first."""
    defences = dict.fromkeys(row.defence for row in rows)
    known = known or {}
    found = [
        aggregate(d, [row for row in rows if row.defence == d], networks, known) for d in defences
    ]
    found.sort(key=_order)
    undefended = list({row.model: _undefended(row) for row in rows if row.ca_before}.values())
    return [aggregate(NO_DEFENCE, undefended, networks, known), *found]


def aggregate(
    defence: str, rows: Sequence[Row], networks: int, known: Mapping[str, Row] | None = None
) -> Aggregate:
    """``rows`` of one defence on so many networks; ``known``: see ``Summary``."""
    seeds = len({row.seed for row in rows})
    expected = networks * seeds
    scored = [row for row in rows if row.scored]
    backdoored = [row for row in scored if not row.clean_twin]
    drops = [row.ca_drop for row in scored if row.clean_twin and row.ca_drop is not None]
    return Aggregate(
        defence=defence,
        seeds=seeds,
        expected=expected,
        scored=len(scored),
        errors=sum(row.error is not None for row in rows),
        not_applicable=sum(not row.applicable for row in rows),
        complete=len(scored) == expected,
        backdoored=len(backdoored),
        measures={name: _spread(backdoored, name) for name in MEASURES},
        behind=_mean(
            [
                (known[row.model].der or 0.0) - row.der
                for row in backdoored
                if known and row.der is not None and row.model in known
            ]
        ),
        repaired=_share_below(backdoored, "asr_after", REPAIRED_ASR, REPAIRED_DROP),
        traceless=_share_below(backdoored, "excess_asr", TRACELESS, TRACELESS),
        clean=len(drops),
        clean_drop_mean=fmean(drops) if drops else None,
        clean_drop_max=max(drops, default=None),
        seconds=_mean([row.seconds for row in scored]),
        cpu_seconds=_mean([row.cpu_seconds for row in scored]),
        image_forwards=_mean([row.image_forwards for row in scored]),
        peak_memory_mb=max(
            (row.peak_memory_mb for row in scored if row.peak_memory_mb is not None), default=None
        ),
    )


def _undefended(row: Row) -> Row:
    """What the row would be had nothing been done: DER 1/2, at no cost."""
    asr, twin, ceiling = row.asr_before, row.asr_clean_twin, row.der_ceiling
    return replace(
        row,
        seed=0,
        applicable=True,
        error=None,
        ca_after=row.ca_before,
        asr_after=asr,
        ra_after=row.ra_before,
        excess_asr=None if asr is None or twin is None else asr - twin,
        der=None if asr is None else 0.5,
        der_shortfall=None if ceiling is None else ceiling - 0.5,
        seconds=None,
        cpu_seconds=None,
        image_forwards=None,
        peak_memory_mb=None,
    )


def _spread(rows: Sequence[Row], name: str) -> Spread | None:
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        value = getattr(row, name)
        if value is not None:
            by_seed.setdefault(row.seed, []).append(value)
    values = [value for of_seed in by_seed.values() for value in of_seed]
    if not values:
        return None
    means = [fmean(of_seed) for of_seed in by_seed.values()]
    return Spread(
        mean=fmean(values),
        median=median(values),
        worst=MEASURES[name](values),
        seed_std=stdev(means) if len(means) > 1 else None,
    )


def _share_below(rows: Sequence[Row], name: str, limit: float, drop: float) -> float | None:
    """Share of the rows with the measure that are below both limits."""
    judged = [
        getattr(row, name) < limit and row.ca_drop < drop
        for row in rows
        if getattr(row, name) is not None and row.ca_drop is not None
    ]
    return fmean(judged) if judged else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _order(found: Aggregate) -> tuple[float, str]:
    shortfall = found.measures["der_shortfall"]
    return (float("inf") if shortfall is None else shortfall.mean, found.defence)
