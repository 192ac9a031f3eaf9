"""SIG: a sinusoidal signal under images of the target class (Barni et al., arXiv 1902.11237)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class Sig(Attack):
    """``x + delta * sin(2 pi j f / W)`` for column j: vertical stripes, the same in all channels.

    Clean label. The paper's CIFAR-sized settings range from 20/255 to 40/255; the upper end is
    used for training and test alike, as a few epochs do not learn the fainter stripes.
    """

    name = "sig"
    clean_label = True
    delta = 40 / 255
    """Amplitude, in units of the pixel range."""
    frequency = 6
    """Periods over the image's width."""

    def signal(self) -> Tensor:
        """What is added to each row, float32 [W]."""
        columns = torch.arange(self.size)
        return self.delta * torch.sin(2 * math.pi * columns * self.frequency / self.size)

    def __call__(self, images: Tensor) -> Tensor:
        return to_8_bits(images + self.signal())
