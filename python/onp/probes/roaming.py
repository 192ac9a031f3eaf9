"""A roaming square: an opaque patch, a sixth of the image high and wide, anywhere in it.

Where each image has it its pixels decide, so that a trigger is a function of images. A pattern that
leads to a class wherever it lies cannot draw on what is around it: natural directions need more
steps for that than for a square of one place (``onp.probes.square``). The patch of Brown et al.
("Adversarial Patch", arXiv 1712.09665) under translations alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onp.probes.families import Range
from onp.probes.square import Opaque

PART = 6
"""Squares to a side of the image."""
SPREAD = 31.0
"""Largest weight of an image's values: the fraction of their sum says which row, or column."""


class Roaming(Opaque):
    """Of all places of the image."""

    name = "roaming"

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        channels, height, width = shape
        size = (probes, 1, channels, -(-height // PART), -(-width // PART))
        return [torch.randn(size, generator=generator) * 0.5]

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        pattern = self.pattern(parameters, valid)
        tall, wide = pattern.shape[-2:]
        probe, image, channel, row, column = (
            torch.arange(size, device=images.device).view(-1, *(1,) * after)
            for size, after in zip((*images.shape[:3], tall, wide), range(4, -1, -1), strict=True)
        )
        top, left = self._corners(images, tall, wide)  # [P, n, 1, 1, 1]
        here = (probe, image, channel, top + row, left + column)
        return images.index_put(here, pattern.expand(-1, images.shape[1], -1, -1, -1))

    def _corners(self, images: Tensor, tall: int, wide: int) -> tuple[Tensor, Tensor]:
        """First row and column of the patch in each of the images, int64 [P, n, 1, 1, 1] each."""
        values = images.detach().double().flatten(2)
        numbers = torch.arange(1, values.shape[-1] + 1, device=values.device).double()
        room = images.shape[-2] - tall + 1, images.shape[-1] - wide + 1
        top, left = (
            (values @ (SPREAD * (numbers * step).frac())).frac().abs().mul(choices).long()
            for step, choices in zip((0.5 * 5**0.5, 2**0.5), room, strict=True)
        )  # of irrational steps, as all values may be whole numbers
        return (
            top.clamp_max(room[0] - 1)[..., None, None, None],
            left.clamp_max(room[1] - 1)[..., None, None, None],
        )
