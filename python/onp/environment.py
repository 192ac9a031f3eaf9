"""What onp runs on: versions, the native module, the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from onp import __version__

_PACKAGES = ("numpy", "safetensors", "triton", "torchvision")
_MAPPINGS = Path("/proc/self/maps")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def describe() -> dict[str, Any]:
    """JSON-able facts; None where something is not there, never an error.

    ``libgomp`` lists the OpenMP runtimes that this process has loaded: more than one is a fault.
    """
    return {
        "onp": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        **_native(),
        "cuda_available": torch.cuda.is_available(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "libgomp": _loaded_libraries("libgomp"),
    }


def cores() -> int:
    """CPUs that this process may use at a time: those it is bound to, or fewer where its control
    group has a share of them (``docker --cpus``)."""
    bound = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return bound


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    """Whether the native module loads, and what is in it."""
    try:
        from onp.ops import build_info
    except ImportError as error:
        return {"extension": f"cannot be imported: {error}"}
    return {
        "extension": "loaded",
        "cuda_in_build": build_info.with_cuda(),
        "instruction_sets": build_info.instruction_sets(),
    }


def _loaded_libraries(name: str) -> list[str]:
    """Paths of the shared libraries called ``name*`` in this process (Linux only, else empty)."""
    if not _MAPPINGS.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in _MAPPINGS.read_text().splitlines()}
    return sorted(path for path in paths if Path(path).name.startswith(name))
