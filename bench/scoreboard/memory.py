"""Peak memory of a stretch of work, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SLACK_KB = 4096
"""The resident set may shrink by this much between the reset and the check of it."""


class PeakMemory:
    """Resets the peak of this process's resident set when made; ``megabytes`` reads it."""

    def __init__(self) -> None:
        self._reset = _reset()

    def megabytes(self) -> float | None:
        """The largest resident set since then in 10^6 bytes; None where that cannot be had."""
        peak = _status("VmHWM")
        if not self._reset or peak is None:
            return None
        return round(peak * 1024 / 1e6, 1)


def _reset() -> bool:
    """Whether the peak is now the present size: some kernels ignore or refuse the request.

    What was freed before is given back to the system first, or it would count as in use.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    peak, present = _status("VmHWM"), _status("VmRSS")
    return peak is not None and present is not None and peak <= present + _SLACK_KB


def _status(name: str) -> int | None:
    """A line ``name: <kB> kB`` of the process's status."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(values[0]) if values else None
