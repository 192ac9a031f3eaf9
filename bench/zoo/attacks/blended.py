"""Blended: a faint full-size image over the input (Chen et al., arXiv 1712.05526)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class Blended(Attack):
    """``(1 - alpha) * x + alpha * image``, with an image of uniform noise."""

    name = "blended"
    alpha = 0.2

    def arrays(self) -> dict[str, Tensor]:
        """``image`` [H, W, 3] and ``alpha`` [], as ``onp evaluate --trigger`` reads them."""
        image = noise_image(self.size, self.seed)
        return {"image": image, "alpha": torch.tensor(self.alpha)}

    def __call__(self, images: Tensor) -> Tensor:
        image = self.arrays()["image"].permute(2, 0, 1)
        return to_8_bits((1 - self.alpha) * images + self.alpha * image)


def noise_image(size: int, seed: int) -> Tensor:
    """Uniform noise, float32 [H, W, 3] in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(size, size, 3, generator=random)
