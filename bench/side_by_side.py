"""Networks side by side: each in a process of its own, with its part of the cores.

Small networks fill a few cores better as several processes than as several threads of one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def run_side_by_side(
    module: str, models: Sequence[str], options: Sequence[str], jobs: int
) -> dict[str, int]:
    """Run ``python -m <module> <options> --models <name>`` for every network, ``jobs`` at a time.

    They start in the order of ``models``. The cores are shared evenly: each process has its part of
    the threads, so its numbers are those of a run with that many. Returns exit codes by network.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def run(model: str) -> int:
        command = [sys.executable, "-m", module, *options, "--models", model]
        return subprocess.run(command, env=environment, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(models, pool.map(run, models), strict=True))
