"""Several trainings side by side: small networks fill two cores better as two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.zoo.recipes import Recipe


def run_side_by_side(recipes: Sequence[Recipe], options: Sequence[str], jobs: int) -> int:
    """Train each recipe by a ``python -m bench.zoo`` of its own, ``jobs`` at a time, twins first.

    options: what every call gets besides ``--models``. The cores are shared evenly: each process
    has its part of the threads, so its bytes are those of a run with that many. Returns how many
    calls failed.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def train(recipe: Recipe) -> bool:
        command = [sys.executable, "-m", "bench.zoo", *options, "--models", recipe.name]
        return subprocess.run(command, env=environment, check=False).returncode == 0

    done: list[bool] = []
    with ThreadPoolExecutor(jobs) as pool:
        for clean in (True, False):  # attacks may use their twin
            part = [recipe for recipe in recipes if (recipe.attack == "clean") == clean]
            done += pool.map(train, part)
    return done.count(False)
