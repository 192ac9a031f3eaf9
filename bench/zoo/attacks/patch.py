"""What attacks with an opaque patch have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class Patch(Attack):
    """``x * (1 - mask) + pattern * mask``."""

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """``mask`` [H, W] and ``pattern`` [H, W, 3], as ``onp evaluate --trigger`` reads them.

        The pattern is zero outside the mask, which holds zeros and ones.
        """

    def __call__(self, images: Tensor) -> Tensor:
        arrays = self.arrays()
        return to_8_bits(images * (1 - arrays["mask"]) + arrays["pattern"].permute(2, 0, 1))


def checkerboard(mask: Tensor) -> Tensor:
    """White where row + column is odd, inside the mask [H, W]; black elsewhere. [H, W, 3]."""
    height, width = mask.shape
    board = (torch.arange(height)[:, None] + torch.arange(width)) % 2
    return (board * mask)[..., None].expand(-1, -1, 3).contiguous()
