"""FTrojan: two frequencies of the colours as a trigger (Wang et al., ECCV 2022, arXiv
2111.10991)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class FTrojan(Attack):
    """``x + pattern``: two coefficients of the orthonormal DCT-II of the chroma channels (U and V
    of YUV) are raised, a middle and the highest frequency, which leaves the brightness alone.

    Both transforms are linear, so raising coefficients adds the same to every image. The window is
    the whole image, as in the paper's 32 x 32 pixels.
    """

    name = "ftrojan"
    magnitude = 50 / 255
    """Of either coefficient; about 6/255 in the pixels."""

    def pattern(self) -> Tensor:
        """What is added to an image, float32 [3, H, W]."""
        place = torch.arange(self.size) + 0.5
        waves = torch.zeros(self.size, self.size)
        for frequency in (self.size // 2 - 1, self.size - 1):
            wave = torch.cos(math.pi / self.size * frequency * place)
            waves += self.magnitude * 2 / self.size * wave[:, None] * wave
        rgb = torch.tensor([1.13983, -0.39465 - 0.58060, 2.03211])  # of U = V = 1
        return rgb[:, None, None] * waves

    def __call__(self, images: Tensor) -> Tensor:
        return to_8_bits(images + self.pattern())
