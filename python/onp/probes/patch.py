"""Patch triggers: a mask and a pattern, kept small by an L1 price on the mask.

Neural Cleanse's optimisation (Wang et al., IEEE S&P 2019, section IV), with the price raised
while the trigger succeeds and lowered while it does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onp.probes.families import Range, pixel_scale


class Patch:
    name = "patch"
    learning_rate = 0.25
    reference = 4.0
    """L2 norm of a patch on 32x32 images that clean networks need for a class."""

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        channels, height, width = shape
        mask = torch.randn(probes, 1, 1, height, width, generator=generator) * 0.1 - 2.0
        pattern = torch.randn(probes, 1, channels, height, width, generator=generator) * 0.5
        return [mask, pattern]

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        mask = parameters[0].sigmoid()
        pattern = valid[0] + (valid[1] - valid[0]) * parameters[1].sigmoid()
        return images + mask * (pattern - images)

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        """The sigmoids keep both parts in range."""

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        mask = parameters[0].sigmoid()
        strength = mask * (parameters[1].sigmoid() - 0.5).abs().clamp_min(0.25) * 2
        return strength.flatten(1).norm(dim=1) / (self.reference * pixel_scale(mask.shape))

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        mask = parameters[0].sigmoid()
        return mask.flatten(1).sum(1) * (0.02 / pixel_scale(mask.shape) ** 2)
