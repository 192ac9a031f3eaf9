"""What a row was measured with: commit, versions, processor."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from onp import __version__

_ROOT = Path(__file__).parents[2]
_NOT_RESULTS = ":!bench/results"
_CPUINFO = Path("/proc/cpuinfo")


def provenance() -> dict[str, Any]:
    """The fields of a row of the same names."""
    return {
        "commit": _commit(),
        "onp": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
    }


def _commit() -> str | None:
    """The commit of the sources, with ``-dirty`` where tracked files differ from it; the results,
    which grow while rows are made, do not count."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", _NOT_RESULTS)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return run.stdout.strip()


def _cpu() -> str | None:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0] or None
