"""Facts about the native module, for reports."""

from __future__ import annotations

import torch  # noqa: F401  before the native module, so that one OpenMP runtime is loaded

from onp import _C


def with_cuda() -> bool:
    """Whether the CUDA kernels are in this build."""
    return _C.with_cuda


def instruction_sets() -> list[str]:
    """Instruction sets of this processor that the native kernels can use."""
    return _C.instruction_sets()
