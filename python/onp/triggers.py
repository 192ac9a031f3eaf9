"""Known triggers, put on images to score a repair. No part of a repair may use one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onp.errors import BadData, UsageError
from onp.files import file_error
from onp.trusted import import_callable, is_code_spec

Trigger = Callable[[Tensor], Tensor]
"""Clean images, float [N, C, H, W] in [0, 1], to triggered ones of the same shape."""

_MAX_VALUES = 1 << 24
"""Values in one array of a trigger file; an image of 2048 by 2048 in colour has fewer."""


@dataclass(frozen=True)
class Blend:
    """``(1 - weight) * x + addend``, rounded to 8 bits as an image file would be."""

    weight: Tensor
    """float32, broadcasts over [C, H, W]: how much of the image is replaced, in [0, 1]."""
    addend: Tensor
    """float32 [C, H, W]: what is added in its place."""

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.addend.shape:
            raise BadData(
                f"the trigger is for images of shape {_hwc(self.addend.shape)} (height, width, "
                f"channels), the data's are {_hwc(images.shape[1:])}"
            )
        weight, addend = self.weight.to(images), self.addend.to(images)
        return to_8_bits((1 - weight) * images + addend)


def to_8_bits(images: Tensor) -> Tensor:
    """Round values in [0, 1] to multiples of 1/255."""
    return (images.clamp(0, 1) * 255).round() / 255


def load_trigger(spec: str, trust: bool = False) -> Trigger:
    """A trigger from an npz file, or ``package.module:function`` (whose code runs: ``trust``).

    The file holds ``mask`` [H, W] and ``pattern`` [H, W, C] for ``x * (1 - mask) + pattern * mask``
    or ``alpha`` (a number) and ``image`` [H, W, C] for ``(1 - alpha) * x + alpha * image``, all in
    [0, 1]. Raises UsageError for a wrong path or missing trust, BadData for what does not fit.
    """
    if is_code_spec(spec):
        return _checked(import_callable(spec, "--trigger", trust), spec)
    arrays = _read_arrays(Path(spec))
    if arrays.keys() == {"mask", "pattern"}:
        weight, image = arrays["mask"], arrays["pattern"]
        fits = image.ndim == 3 and weight.shape == image.shape[:2]
    elif arrays.keys() == {"alpha", "image"}:
        weight, image = arrays["alpha"], arrays["image"]
        fits = image.ndim == 3 and weight.ndim == 0
    else:
        raise BadData(
            f"{spec}: a trigger file holds mask and pattern, or alpha and image, "
            f"got {', '.join(sorted(arrays)) or 'nothing'}"
        )
    if not fits:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise BadData(
            f"{spec}: shapes must be mask [H, W] or alpha [], image [H, W, C]; got {shapes}"
        )
    chw = image.permute(2, 0, 1).contiguous()
    return Blend(weight, weight * chw)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Every array of the npz file as float32, checked to be finite and in [0, 1]."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
        if sum(sizes.values()) > 2 * 8 * _MAX_VALUES:
            raise BadData(f"{path}: the trigger file unpacks to {sum(sizes.values())} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
        tensors = {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()}
    except OSError as error:
        raise file_error("read", path, error) from None
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError, TypeError) as error:
        raise BadData(f"{path}: not a trigger file (npz): {error}") from error
    for name, tensor in tensors.items():
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise BadData(f"{path}: {name} must be in [0, 1]")
    return tensors


def _checked(function: Trigger, spec: str) -> Trigger:
    """``function`` with its errors and results checked, and rounded to 8 bits."""

    def trigger(images: Tensor) -> Tensor:
        try:
            result = function(images.clone())
        except Exception as error:
            raise UsageError(f"--trigger {spec} failed: {type(error).__name__}: {error}") from error
        if not isinstance(result, Tensor) or result.shape != images.shape:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise UsageError(f"--trigger {spec} must return {list(images.shape)}, got {got}")
        if not bool(torch.isfinite(result).all()):
            raise UsageError(f"--trigger {spec} returned NaN or infinite values")
        return to_8_bits(result.to(images))

    return trigger


def _hwc(chw: torch.Size) -> tuple[int, ...]:
    return (*chw[1:], *chw[:1])
