"""What a caller may ask for, checked: each function raises UsageError for what cannot be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import SupportsIndex, get_args

import torch
from torch import Tensor

from onp.config import BUDGETS, Config, SearchPrecision
from onp.errors import BadData, UsageError

MOST_THREADS = 256
"""Or as many as there are cores: thousands end in a fault of the runtime that starts them."""


def config_of(budget: str | Config) -> Config:
    """The configuration that a budget names, or is; raises UsageError for one that is none."""
    if isinstance(budget, str) and budget in BUDGETS:
        return BUDGETS[budget]
    if not isinstance(budget, Config):
        raise UsageError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if budget.search_precision not in get_args(SearchPrecision):
        raise UsageError(
            f"search_precision must be one of {', '.join(get_args(SearchPrecision))}, "
            f"got {budget.search_precision!r}"
        )
    return budget


def checked_seed(seed: SupportsIndex) -> int:
    """The seed. Raises UsageError for one that torch's generators do not take."""
    number = _integer(seed)
    if number is None or not 0 <= number < 2**63:
        raise UsageError(f"seed must be a number from 0 to 2^63 - 1, got {seed!r}")
    return number


def checked_range(input_range: tuple[float, float]) -> tuple[float, float]:
    """The smallest and largest value. Raises UsageError where these are none."""
    try:
        low, high = map(float, input_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UsageError(
            f"input_range must be (low, high), finite, with low < high, got {input_range}"
        )
    return low, high


def checked_target(target: SupportsIndex | None, labels: Tensor, classes: int) -> int | None:
    """The class that is named. Raises UsageError where it is none of the network's, and BadData
    where none of the ``labels`` int64 [N] is of it: what pruning costs it could not be seen."""
    if target is None:
        return None
    number = _integer(target)
    if number is None or not 0 <= number < classes:
        raise UsageError(f"target {target!r} is none of the network's classes, 0 to {classes - 1}")
    if not bool((labels == number).any()):
        raise BadData(f"no clean image is of class {number}, the target that was named")
    return number


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises UsageError where it is neither the CPU nor a GPU that is
    there. A GPU is not touched: a process that leaves it to others should hold no memory there."""
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {device} cannot be used: {error}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device {chosen} cannot be used: onp computes on cpu or cuda")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {chosen} was asked for, but torch sees no CUDA device here")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"device {chosen} was asked for, but torch sees {torch.cuda.device_count()} here, "
                "numbered from 0"
            )
    return chosen


@contextmanager
def torch_settings(threads: SupportsIndex | None) -> Iterator[None]:
    """For a while torch and the engine use so many threads (None: as many as they do), and what is
    made is float32, whatever the caller has set."""
    before = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(before[0] if threads is None else checked_threads(threads))
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])


def checked_threads(threads: SupportsIndex) -> int:
    """The number of threads. Raises UsageError for one that is none, or far beyond the cores."""
    count, most = _integer(threads), max(MOST_THREADS, os.cpu_count() or 1)
    if count is None or not 1 <= count <= most:
        raise UsageError(f"threads must be a number from 1 to {most}, got {threads!r}")
    return count


def _integer(value: SupportsIndex) -> int | None:
    """The integer that a value is; None for what is none, as for True and False."""
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None
