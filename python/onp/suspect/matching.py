"""Weights meet a network: by name, never by position."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from onp.errors import UnsafeOrCorruptModel, quoted

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and training wrappers put before every key."""

_LISTED = 5
"""Keys that an error lists before it only counts."""


def wrapper_prefix(keys: Collection[str]) -> str:
    """The wrappers' prefixes, possibly stacked, that all of ``keys`` begin with; may be empty."""
    prefix = ""
    while keys:
        for wrapper in WRAPPERS:
            longer = prefix + wrapper
            if all(key.startswith(longer) and key != longer for key in keys):
                prefix = longer
                break
        else:
            break
    return prefix


def load_by_name(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy ``state_dict`` into the parameters and buffers of ``model`` that have the same names.

    Wrappers' prefixes count on neither side. Every name of either side must be on the other and
    have the same shape; only BatchNorm's ``num_batches_tracked`` may be missing, and is then left
    as it is. Floating-point weights of any width are cast to the model's dtype (half to float32).
    ``model`` is changed only if everything fits, else UnsafeOrCorruptModel lists what does not.
    """
    wanted = _without_prefix(model.state_dict())
    given = _without_prefix(state_dict)
    missing = [
        f"{quoted(key)} {_shape(tensor)}"
        for key, tensor in wanted.items()
        if key not in given and not key.endswith("num_batches_tracked")
    ]
    unexpected = [
        f"{quoted(key)} {_shape(tensor)}" for key, tensor in given.items() if key not in wanted
    ]
    mismatching = [
        f"{quoted(key)} is {_shape(given[key])}, the network's is {_shape(tensor)}"
        for key, tensor in wanted.items()
        if key in given and not _fits(given[key], tensor)
    ]
    if missing or unexpected or mismatching:
        parts = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("of another shape or type", mismatching),
        ]
        raise UnsafeOrCorruptModel(
            f"the weights do not fit {type(model).__name__}: " + "; ".join(filter(None, parts))
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            if key in given:
                tensor.copy_(given[key])


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = len(wrapper_prefix(tensors.keys()))
    return {key[start:]: tensor for key, tensor in tensors.items()}


def _fits(given: Tensor, wanted: Tensor) -> bool:
    same_kind = given.is_floating_point() == wanted.is_floating_point()
    return given.shape == wanted.shape and same_kind and not given.is_complex()


def _shape(tensor: Tensor) -> str:
    """Such as ``[64, 3, 3, 3]``, with the dtype where it is not a floating-point one."""
    dtype = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{dtype}"


def _listed(what: str, entries: Iterable[str]) -> str:
    """``what`` and up to five entries, with the count of the others; empty if there are none."""
    all_entries = list(entries)
    if not all_entries:
        return ""
    more = len(all_entries) - _LISTED
    shown = ", ".join(all_entries[:_LISTED]) + (f" and {more} more" if more > 0 else "")
    return f"{what}: {shown}"
