"""Additive triggers: one small perturbation for all images, inside an L2 ball."""

from __future__ import annotations

import torch
from torch import Tensor

from onp.probes.families import Range, l2_ball, pixel_scale


class Additive:
    name = "additive"
    learning_rate = 0.04
    radius = 2.0
    """L2 bound on 32x32 images with pixels in [0, 1]."""

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        return [torch.randn(probes, 1, *shape, generator=generator) * 1e-3]

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        return (images + parameters[0] * (valid[1] - valid[0])).clamp(*valid)

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        l2_ball(parameters[0], self.radius * pixel_scale(parameters[0].shape))

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        bound = self.radius * pixel_scale(parameters[0].shape)
        return parameters[0].flatten(1).norm(dim=1) / bound

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        return parameters[0].flatten(1).norm(dim=1) * (0.1 / pixel_scale(parameters[0].shape))
