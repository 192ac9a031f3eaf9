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
"""Bytes; well over any cache, eight times as many on a GPU."""


@dataclass(frozen=True)
class Ceilings:
    """Of the machine as it is now."""

    fp32_gflops: float
    copy_gbytes: float
    """Read and written, a second."""
    tf32_gflops: float | None = None
    """On a GPU; of a matrix product there, as the others are."""
    bf16_gflops: float | None = None
    """On a processor with AVX-512 BF16, and on a GPU."""
    int8_gops: float | None = None
    """On a processor with AVX-512 VNNI."""

    @classmethod
    def measured(cls, threads: int) -> Ceilings:
        fp32, int8, bf16 = multiply_adds(threads)
        return cls(fp32, round(copy_gbytes(threads), 1), bf16_gflops=bf16, int8_gops=int8)

    @classmethod
    def measured_on_gpu(cls) -> Ceilings:
        return cls(
            round(product_gflops(torch.float32)),
            round(copy_gbytes(1, "cuda"), 1),
            round(product_gflops(torch.float32, tf32=True)),
            round(product_gflops(torch.bfloat16)),
        )

    def gflops(self, precision: str) -> float | None:
        """Of a row's precision, where it was measured."""
        return {"fp32": self.fp32_gflops, "tf32": self.tf32_gflops}.get(precision, self.bf16_gflops)


def best_time(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` runs, one before them not counted."""

    def finished() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    run()
    finished()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        finished()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def multiply_adds(threads: int) -> tuple[float, float | None, float | None]:
    """Multiply-adds in fp32, of bytes and in bf16 on ``threads`` cores, counted as two operations
    each, in 1e9 a second; None without AVX-512 VNNI or BF16.

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
        loaded = ctypes.CDLL(str(library))

        def rate(name: str, width: int) -> float | None:
            loop = getattr(loaded, name, None)
            if loop is None:
                return None
            loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_float
            with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
                seconds = best_time(lambda: list(pool.map(loop, [STEPS] * threads)), 3)
            return round(2 * CHAINS * width * STEPS * threads / seconds / 1e9, 1)

        fp32 = rate("fma_loop", lanes)
        assert fp32 is not None
        return fp32, rate("byte_loop", 4 * lanes), rate("half_loop", 2 * lanes)


def copy_gbytes(threads: int, device: str = "cpu") -> float:
    """Bytes read and written by a copy, in GB/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size = COPIED if device == "cpu" else 8 * COPIED
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = best_time(lambda: target.copy_(source), 5)
    torch.set_num_threads(before)
    return 2 * size / seconds / 1e9


def product_gflops(dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Of a square matrix product of random numbers on the GPU, in GFLOP/s."""
    side = 8192
    one, other = torch.randn(2, side, side, device="cuda").to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    seconds = best_time(lambda: one @ other, 10)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / seconds / 1e9
