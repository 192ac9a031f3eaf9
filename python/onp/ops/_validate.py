"""Checks that several operations share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_images(op: str, images: Tensor, image_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless images are float32 ``[N, *image_shape]``."""
    if images.dtype != torch.float32 or images.shape[1:] != image_shape:
        raise ValueError(
            f"{op}: images must be float32 [N, {image_shape}], "
            f"got {images.dtype} {tuple(images.shape)}"
        )


def check_gates(op: str, gates: Tensor | None, images: int, sites: int) -> None:
    """Raise ValueError unless ``gates`` is None or float32 ``[S]`` or ``[N, S]``."""
    shapes = ((sites,), (images, sites))
    if gates is not None and (gates.dtype != torch.float32 or gates.shape not in shapes):
        raise ValueError(
            f"{op}: gates must be float32 of shape {shapes[0]} or {shapes[1]}, "
            f"got {gates.dtype} {tuple(gates.shape)}"
        )
