"""The machine's ceilings, measured: multiply-adds a second, and bytes copied a second."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("peak.c")
CHAINS = 12
STEPS = 4_000_000
COPIED = 256 << 20
"""Bytes; well over any cache."""


@dataclass(frozen=True)
class Ceilings:
    """Of the machine as it is now."""

    fp32_gflops: float
    copy_gbytes: float
    """Read and written, a second."""

    @classmethod
    def measured(cls, threads: int) -> Ceilings:
        return cls(round(fp32_gflops(threads), 1), round(copy_gbytes(threads), 1))


def best_time(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` runs, one before them not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def fp32_gflops(threads: int) -> float:
    """Multiply-adds in fp32 on ``threads`` cores, counted as two operations each, in GFLOP/s.

    Compiled on the spot for this processor; raises RuntimeError where there is no compiler.
    """
    lanes = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        command = [
            "cc", "-O3", "-march=native", "-ffp-contract=fast", "-funroll-loops", "-shared",
            "-fPIC", f"-DLANES={lanes}", str(_SOURCE), "-o", str(library),
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"the peak needs a C compiler called cc: {error}") from error
        loop = ctypes.CDLL(str(library)).fma_loop
        loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_float
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
            seconds = best_time(lambda: list(pool.map(loop, [STEPS] * threads)), 3)
    return 2 * CHAINS * lanes * STEPS * threads / seconds / 1e9


def copy_gbytes(threads: int) -> float:
    """Bytes read and written by a copy, in GB/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    seconds = best_time(lambda: target.copy_(source), 5)
    torch.set_num_threads(before)
    return 2 * COPIED / seconds / 1e9
