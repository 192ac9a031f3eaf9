"""What an untrusted file held -> a flat state dict whose tensors are safe to compute with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from onp.errors import UnsafeOrCorruptModel, quoted
from onp.suspect.matching import wrapper_prefix

NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "net")
"""Keys under which training scripts put the state dict beside the epoch and the optimizer."""

MAX_TENSORS = 100_000

_MAX_NESTING = 4
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def flat_state_dict(loaded: object, max_bytes: int) -> dict[str, Tensor]:
    """The state dict in ``loaded``: unwrapped, prefixes stripped, every tensor checked.

    Tensors keep their dtypes. A tensor must be dense, on the CPU and no larger than the storage
    behind it (a stride of 0 turns bytes into terabytes), all together at most ``max_bytes``;
    weights must be finite and running variances not negative. Raises UnsafeOrCorruptModel.
    """
    tensors = _as_tensors(_unwrapped(loaded))
    total = 0
    for key, tensor in tensors.items():
        _check_storage(key, tensor)
        total += math.prod(tensor.shape) * tensor.element_size()
    if total > max_bytes:
        raise UnsafeOrCorruptModel(f"the tensors take {total} bytes, more than {max_bytes}")
    for key, tensor in tensors.items():
        _check_values(key, tensor)
    start = len(wrapper_prefix(tensors.keys()))
    return {key[start:]: tensor.detach().contiguous() for key, tensor in tensors.items()}


def _unwrapped(loaded: object) -> Mapping[object, object]:
    """The innermost mapping that holds tensors, found under ``NESTED_UNDER``."""
    for _ in range(_MAX_NESTING):
        if not isinstance(loaded, Mapping):
            raise UnsafeOrCorruptModel(
                f"the file holds {quoted(type(loaded).__name__)}, not a state dict"
            )
        nested = [key for key in NESTED_UNDER if isinstance(loaded.get(key), Mapping)]
        if len(nested) > 1:
            raise UnsafeOrCorruptModel(
                f"the file holds several state dicts ({', '.join(nested)}); save the one to repair"
            )
        if not nested:
            if any(isinstance(value, Tensor) for value in loaded.values()):
                return loaded
            break
        loaded = loaded[nested[0]]
    raise UnsafeOrCorruptModel(
        f"the file holds no weights, neither at the top nor under {', '.join(NESTED_UNDER)}"
    )


def _as_tensors(mapping: Mapping[object, object]) -> dict[str, Tensor]:
    if len(mapping) > MAX_TENSORS:
        raise UnsafeOrCorruptModel(f"{len(mapping)} entries are more than {MAX_TENSORS}")
    tensors = {}
    for key, value in mapping.items():
        if not isinstance(key, str) or not key:
            raise UnsafeOrCorruptModel(f"the state dict has the key {quoted(key)}, not a name")
        if not isinstance(value, Tensor):
            raise UnsafeOrCorruptModel(f"{quoted(key)} is {type(value).__name__}, not a tensor")
        tensors[key] = value
    return tensors


def _check_storage(key: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UnsafeOrCorruptModel(
            f"{quoted(key)} must be a dense tensor, got {tensor.layout} on {tensor.device}"
        )
    if tensor.dtype not in _FLOATS + _INTEGERS:
        raise UnsafeOrCorruptModel(f"{quoted(key)} has the unsupported type {tensor.dtype}")
    needed = math.prod(tensor.shape) * tensor.element_size()
    stored = tensor.untyped_storage().nbytes()
    if needed > stored:
        raise UnsafeOrCorruptModel(
            f"{quoted(key)} claims {needed} bytes, of which the file stores {stored}"
        )


def _check_values(key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if not bool(torch.isfinite(tensor.float()).all()):  # as float32, which the network computes in
        raise UnsafeOrCorruptModel(f"{quoted(key)} holds NaN or infinite values")
    if key.endswith("running_var") and bool((tensor < 0).any()):
        raise UnsafeOrCorruptModel(f"{quoted(key)} holds negative variances")
