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
