"""What a row was measured with: commit, versions, processor."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from onp import __version__

_ROOT = Path(__file__).parents[2]
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
    """The commit of the sources, with ``-dirty`` where tracked files differ from it."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _cpu() -> str | None:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0] or None
