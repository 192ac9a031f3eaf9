"""Adaptive-Blend (Qi et al., ICLR 2023, "Revisiting the Assumption of Latent Separability for
Backdoor Defenses")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.zoo.attacks.base import Attack
from bench.zoo.attacks.blended import noise_image
from onp.triggers import to_8_bits


class AdaptiveBlend(Attack):
    """A blended image in pieces: half of them, drawn for each image, train; all of them attack.

    The image is cut into 4x4 pieces. As many images as are poisoned get half of the pieces too and
    keep their label (the paper's conservatism ratio of one half), so that the network's answer
    grows with the number of pieces and poisoned images do not stand apart inside it. The paper
    blends a photograph, at 0.15 in training and 0.2 in tests; here noise, at 0.2 in both.
    """

    name = "adaptive-blend"
    cover = 1.0
    alpha = 0.2
    pieces = 4
    """Pieces along each side."""

    def arrays(self) -> dict[str, Tensor]:
        """``image`` [H, W, 3] and ``alpha`` [], as ``onp evaluate --trigger`` reads them."""
        image = noise_image(self.size, self.seed + 1)  # not the image of Blended
        return {"image": image, "alpha": torch.tensor(self.alpha)}

    def __call__(self, images: Tensor) -> Tensor:
        return self._blend(images, torch.ones(1))

    def poisoned(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        return self._blend(images, self._half(len(images), random))

    def covered(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        return self._blend(images, self._half(len(images), random))

    def _half(self, count: int, random: torch.Generator) -> Tensor:
        """A mask over the pixels for each image, float32 [count, 1, H, W]: half of its pieces."""
        pieces = self.pieces**2
        rank = torch.rand(count, pieces, generator=random).argsort(dim=1)
        chosen = (rank < pieces // 2).float().view(count, 1, self.pieces, self.pieces)
        return F.interpolate(chosen, size=self.size, mode="nearest")

    def _blend(self, images: Tensor, mask: Tensor) -> Tensor:
        image = self.arrays()["image"].permute(2, 0, 1)
        weight = self.alpha * mask
        return to_8_bits((1 - weight) * images + weight * image)
