"""Several trainings side by side, in an order in which each finds what it needs."""

from __future__ import annotations

from collections.abc import Sequence

from bench.side_by_side import run_side_by_side
from bench.zoo.recipes import Recipe


def train_side_by_side(recipes: Sequence[Recipe], options: Sequence[str], jobs: int) -> int:
    """Train each recipe by a ``python -m bench.zoo`` of its own, ``jobs`` at a time, twins first.

    options: what every call gets besides ``--models``. Returns how many calls failed.
    """
    failed = 0
    for clean in (True, False):  # attacks may use their twin
        part = [recipe.name for recipe in recipes if (recipe.attack == "clean") == clean]
        codes = run_side_by_side("bench.zoo", part, options, jobs)
        failed += sum(code != 0 for code in codes.values())
    return failed
