"""What training does to a batch of images before the network sees them, seeded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, in this order; what is 0 or False draws nothing."""

    resized: float = 0.0
    """Smallest share of an image that a random crop keeps, which is then made as large again."""
    rotation: float = 0.0
    """Degrees, at most, either way; black corners."""
    colour: float = 0.0
    """Brightness, contrast and saturation are multiplied by 1 - colour to 1 + colour."""
    erasing: float = 0.0
    """Side of a black square over the image's (Cutout: DeVries & Taylor, arXiv 1708.04552)."""
    mixup: float = 0.0
    """Of the Beta distribution that says how two images are mixed, and their labels (Zhang et al.,
    ICLR 2018)."""
    smoothing: float = 0.0
    """Share of every label that is spread over all classes."""

    def __call__(self, x: Tensor, random: torch.Generator) -> Tensor:
        """Images float32 [N, 3, H, W] in [0, 1]; mixing and smoothing are the loss's."""
        if self.resized or self.rotation:
            x = self._moved(x, random)
        if self.colour:
            x = self._coloured(x, random)
        if self.erasing:
            x = self._erased(x, random)
        return x

    def _moved(self, x: Tensor, random: torch.Generator) -> Tensor:
        count = len(x)
        angle = (2 * torch.rand(count, generator=random) - 1) * math.radians(self.rotation)
        least = self.resized or 1.0
        scale = (least + (1 - least) * torch.rand(count, generator=random)).sqrt()
        shift = (2 * torch.rand(count, 2, generator=random) - 1) * (1 - scale)[:, None]
        cos, sin = scale * angle.cos(), scale * angle.sin()
        rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(count, 2, 3)
        grid = F.affine_grid(rows, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def _coloured(self, x: Tensor, random: torch.Generator) -> Tensor:
        factors = 1 + self.colour * (2 * torch.rand(3, len(x), 1, 1, 1, generator=random) - 1)
        brightness, contrast, saturation = factors
        x = (x * brightness).clamp(0, 1)
        grey = x.mean((1, 2, 3), keepdim=True)
        x = (grey + contrast * (x - grey)).clamp(0, 1)
        grey = x.mean(1, keepdim=True)
        return (grey + saturation * (x - grey)).clamp(0, 1)

    def _erased(self, x: Tensor, random: torch.Generator) -> Tensor:
        """The square's middle lies anywhere in the image."""
        count, _, height, width = x.shape
        half = self.erasing * height / 2
        row = torch.rand(count, 1, generator=random) * height
        column = torch.rand(count, 1, generator=random) * width
        down = (torch.arange(height) + 0.5 - row).abs() < half
        right = (torch.arange(width) + 0.5 - column).abs() < half
        return x * ~(down[:, None, :, None] & right[:, None, None, :])

    def mixed(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
        """Images float32 [N, 3, H, W], the labels int64 [N] of what the rest of each is made of,
        and the share that is its own."""
        if not self.mixup:
            return x, y, 1.0
        share = float(torch._sample_dirichlet(torch.tensor([self.mixup] * 2), random)[0])
        other = torch.randperm(len(x), generator=random).to(x.device)
        return share * x + (1 - share) * x[other], y[other], share
