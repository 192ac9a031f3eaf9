"""Squares: opaque patches of a fixed place, a sixteenth of the image each.

A patch that may lie anywhere finds what tells classes apart, in the middle of the image, where each
class has some. In one place all classes have the same to work with, so there a class that a few
steps lead to stands out, wherever a backdoor's trigger lies or spreads (bench/NOTES.md, "Squares").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.probes.families import Range

SIDES = 4
"""Squares to a side of the image."""


class Opaque:
    """What opaque patches of one size have in common: only their pattern is learned."""

    learning_rate = 0.5

    def pattern(self, parameters: list[Tensor], valid: Range) -> Tensor:
        """In the valid range, float32 [P, 1, C, height, width]."""
        return valid[0] + (valid[1] - valid[0]) * parameters[0].sigmoid()

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        """The sigmoid keeps the pattern in range."""

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        """The same for all: they differ in what they reach alone."""
        return torch.ones(len(parameters[0]))

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        """None."""
        return 0.0 * parameters[0].flatten(1).sum(1)


@dataclass(frozen=True)
class Square(Opaque):
    """An opaque square in one place of the grid."""

    row: int
    column: int
    name = "square"

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        channels, height, width = shape
        left, right, top, bottom = self.margins(height, width)
        size = (probes, 1, channels, height - top - bottom, width - left - right)
        return [torch.randn(size, generator=generator) * 0.5]

    def margins(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels of the image to the left, right, top and bottom of it."""
        top, left = self.row * height // SIDES, self.column * width // SIDES
        bottom, right = (self.row + 1) * height // SIDES, (self.column + 1) * width // SIDES
        return left, width - right, top, height - bottom

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        margins = self.margins(images.shape[-2], images.shape[-1])
        pattern = self.pattern(parameters, valid)
        clear = F.pad(torch.zeros_like(pattern[:1, :1, :1]), margins, value=1.0)
        return images * clear + F.pad(pattern, margins)


SQUARES = [Square(row, column) for row in range(SIDES) for column in range(SIDES)]
"""One for each place."""
