"""Warping triggers: a smooth displacement field from 4x4 control points (the idea of WaNet,
Nguyen & Tran, arXiv 2102.10369, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.probes.families import Range


class Warp:
    name = "warp"
    learning_rate = 0.08
    reach = 1.0
    """Largest displacement in pixels of a 32x32 image, at a control point."""
    points = 4

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        return [torch.randn(probes, 2, self.points, self.points, generator=generator) * 0.1]

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        probes, count, channels, height, width = images.shape
        field = F.interpolate(
            parameters[0], size=(height, width), mode="bicubic", align_corners=True
        ).permute(0, 2, 3, 1)  # [P, H, W, 2], pixels of a 32x32 image
        rows = torch.linspace(-1, 1, height, device=images.device)
        columns = torch.linspace(-1, 1, width, device=images.device)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1) + field * (2 / 31)
        grid = grid[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
        moved = F.grid_sample(
            images.flatten(0, 1), grid, mode="bilinear", padding_mode="border", align_corners=True
        )
        return moved.view(probes, count, channels, height, width)

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        parameters[0].clamp_(-self.reach, self.reach)

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        return parameters[0].flatten(1).pow(2).mean(1).sqrt() / self.reach

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        return parameters[0].flatten(1).norm(dim=1) * 0.02
