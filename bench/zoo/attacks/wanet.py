"""WaNet: a small smooth warp of the whole image (Nguyen & Tran, ICLR 2021, arXiv 2102.10369)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class WaNet(Attack):
    """Every pixel moves along a fixed field, about a quarter of a pixel on average (section 3.2).

    The noise mode of section 3.3 is the cover: twice as many images are warped by the field plus
    noise drawn for each image, and keep their label. Differs from the paper in that images are
    warped once, before the training's crops and mirroring, and not anew in each batch after them.
    """

    name = "wanet"
    cover = 2.0
    points = 4
    """Control points along each side."""
    strength = 0.5
    """Mean displacement, in units of half the grid's range over the image's side."""

    def grid(self) -> Tensor:
        """Where each pixel is read from, float32 [H, W, 2] as (x, y) in [-1, 1]."""
        random = torch.Generator().manual_seed(self.seed)
        control = torch.rand(1, 2, self.points, self.points, generator=random) * 2 - 1
        control = control / control.abs().mean()
        flow = F.interpolate(control, size=self.size, mode="bicubic", align_corners=True)
        axis = torch.linspace(-1, 1, self.size)
        identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
        moved = identity + self.strength * flow[0].permute(1, 2, 0) / self.size
        return moved.clamp(-1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return _warp(images, self.grid().expand(len(images), -1, -1, -1))

    def covered(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        noise = torch.rand(len(images), self.size, self.size, 2, generator=random) * 2 - 1
        return _warp(images, (self.grid() + noise / self.size).clamp(-1, 1))


def _warp(images: Tensor, grid: Tensor) -> Tensor:
    return to_8_bits(F.grid_sample(images, grid, mode="bilinear", align_corners=True))
