"""LF: a smooth additive trigger (Zeng et al., ICCV 2021, arXiv 2104.03413)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class LowFrequency(Attack):
    """``x + pattern``, where the pattern has energy in the lowest DCT frequencies alone.

    The paper searches its pattern against a trained classifier under a low-pass constraint. Here
    it is a seeded random one: normal coefficients on the lowest block of the DCT-II in each
    channel, no constant part, scaled to a fixed amplitude. It keeps what makes the attack
    different from others (nothing for a high-frequency detector to see), not the search.
    """

    name = "lf"
    frequencies = 5
    """Rows and columns of the block of coefficients that are not zero."""
    amplitude = 16 / 255
    """Largest absolute value of the pattern, in units of the pixel range."""

    def pattern(self) -> Tensor:
        """What is added to an image, float32 [3, H, W]."""
        random = torch.Generator().manual_seed(self.seed)
        coefficients = torch.randn(3, self.frequencies, self.frequencies, generator=random)
        coefficients[:, 0, 0] = 0
        frequency = torch.arange(self.frequencies)[:, None]
        place = torch.arange(self.size)[None, :] + 0.5
        waves = torch.cos(math.pi / self.size * frequency * place)  # [frequencies, size]
        pattern = waves.T @ coefficients @ waves
        return pattern * (self.amplitude / pattern.abs().max())

    def __call__(self, images: Tensor) -> Tensor:
        return to_8_bits(images + self.pattern())
