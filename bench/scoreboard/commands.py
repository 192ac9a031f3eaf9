"""The calls that give a set of rows from nothing, told by the rows themselves."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bench.defences.told import TOLD
from bench.scoreboard.rows import Row


def commands(
    set_name: str, networks: Sequence[str], rows: Sequence[Row], extra: Sequence[str] = ()
) -> list[str]:
    """One call for each set of seeds that defences have rows of, the fewest seeds first.

    ``networks`` are the names of the set's; ``extra`` are options of every call. Rows that are
    missing for some of a call's networks and seeds are made by it as well.
    """
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row.defence, set()).add(row.seed)
    calls = []
    for of_call in sorted({tuple(sorted(found)) for found in seeds.values()}, key=_fewest_first):
        part = [row for row in rows if seeds[row.defence] == set(of_call)]
        calls.append(shlex.join(_call(set_name, networks, of_call, part) + list(extra)))
    return calls


def _call(
    set_name: str, networks: Sequence[str], seeds: Sequence[int], rows: Sequence[Row]
) -> list[str]:
    measured = {row.model for row in rows}
    oracle = [row for row in rows if row.oracle and row.defence not in TOLD]
    could_have = any(row.candidates and not row.clean_twin and not row.oracle for row in rows)
    # An oracle that picks by all test images needs no option.
    by = [row.oracle_images for row in oracle
          if row.oracle_images is not None and row.oracle_images != row.test_images]  # fmt: skip
    tested = [row.test_images for row in rows if row.test_images is not None]
    jobs = max(row.jobs for row in rows)

    call = ["python", "-m", "bench.scoreboard", "--set", set_name, "--data", "DATA"]
    call += ["--defences", *sorted({row.defence for row in rows})]
    if measured < set(networks):
        call += ["--models", *(name for name in networks if name in measured)]
    call += ["--seeds", *map(str, seeds), "--clean-samples", str(rows[0].clean_samples)]
    call += ["--test-images", str(max(tested))] if tested else []
    call += ["--no-oracle"] if could_have and not oracle else []
    call += ["--oracle-images", str(min(by))] if by else []
    call += ["--jobs", str(jobs)] if jobs > 1 else []
    return call


def _fewest_first(seeds: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return len(seeds), seeds
