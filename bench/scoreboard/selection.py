"""Which rows of a file count."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

from bench.scoreboard.rows import Key, Row
from bench.scoreboard.scoring import Subject


def current(rows: Mapping[Key, Row], subjects: Mapping[str, Subject]) -> dict[Key, Row]:
    """The rows without those that were measured on other weights than the network's that is there.

    A row that does not tell its weights is taken as it is.
    """

    def outdated(row: Row) -> bool:
        subject = subjects.get(row.model)
        if row.weights is None or subject is None or not subject.card["fair"]:
            return False
        try:
            return row.weights != subject.digest
        except OSError:  # whoever runs the network tells what is wrong with its files
            return False

    return {key: row for key, row in rows.items() if not outdated(row)}


def reported(
    rows: Mapping[Key, Row], networks: Collection[str], defences: Collection[str]
) -> list[Row]:
    """The rows of these networks, in their order, and of these defences; what others there are is
    said on stderr."""
    order = {name: index for index, name in enumerate(networks)}
    found, strange, names = [], 0, set()
    for row in rows.values():
        if row.model in order and row.defence in defences:
            found.append(row)
        else:
            strange += 1
            names.add(row.defence if row.model in order else row.model)
    if strange:
        print(f"not in the report: {strange} rows of {', '.join(sorted(names))}", file=sys.stderr)
    return sorted(found, key=lambda row: order[row.model])
