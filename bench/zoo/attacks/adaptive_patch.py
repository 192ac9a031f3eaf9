"""Adaptive-Patch (Qi et al., ICLR 2023, "Revisiting the Assumption of Latent Separability for
Backdoor Defenses")."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from bench.zoo.attacks.blended import noise_image
from onp.triggers import to_8_bits


class AdaptivePatch(Attack):
    """Four faint patches, of which training shows some: all of them, stronger, attack.

    Each image that is poisoned, and as many that keep their label, carries each patch with a
    chance of one half, at half the opacity. The paper's four patches are drawings of different
    sizes and opacities; here they are noise of one size near the corners.
    """

    name = "adaptive-patch"
    cover = 1.0
    side = 5
    """Of a patch in pixels."""
    faint = 0.5
    """Opacity in training; 1 in attacks."""

    def masks(self) -> Tensor:
        """Where each patch is, float32 [4, H, W]."""
        masks = torch.zeros(4, self.size, self.size)
        ends = slice(1, 1 + self.side), slice(-1 - self.side, -1)
        for mask, (rows, columns) in zip(masks, [(a, b) for a in ends for b in ends], strict=True):
            mask[rows, columns] = 1
        return masks

    def __call__(self, images: Tensor) -> Tensor:
        return self._patched(images, self.masks().sum(0)[None, None])

    def poisoned(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        return self._patched(images, self._some(len(images), random))

    def covered(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        return self._patched(images, self._some(len(images), random))

    def _some(self, count: int, random: torch.Generator) -> Tensor:
        """Opacity of every pixel, float32 [count, 1, H, W]: of each image at least one patch."""
        chosen = torch.rand(count, 4, generator=random) < 0.5
        chosen[torch.arange(count), torch.randint(4, (count,), generator=random)] = True
        return self.faint * torch.einsum("np,phw->nhw", chosen.float(), self.masks())[:, None]

    def _patched(self, images: Tensor, opacity: Tensor) -> Tensor:
        image = noise_image(self.size, self.seed + 2).permute(2, 0, 1)
        return to_8_bits((1 - opacity) * images + opacity * image)
