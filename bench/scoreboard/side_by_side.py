"""Networks side by side: each in a process of its own, with its part of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

ROWS_ONLY = "--rows-only"
"""Option of the processes: append rows, summarise nothing."""


def run_side_by_side(models: Sequence[str], options: Sequence[str], jobs: int) -> list[str]:
    """Run a scoreboard of its own for every network, ``jobs`` at a time; rows go to the same file.

    options: the call's own, without those that pick networks. Rows are appended in one write each,
    so that processes do not tear each other's lines. Returns what failed.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def run(model: str) -> str | None:
        command = [sys.executable, "-m", "bench.scoreboard", *options, "--models", model, ROWS_ONLY]
        code = subprocess.run(command, env=environment, check=False).returncode
        return f"{model}: exit code {code}" if code else None

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for failure in pool.map(run, models) if failure]
