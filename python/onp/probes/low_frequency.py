"""Low-frequency additive triggers: 16x16 DCT coefficients inside an L2 ball.

Smooth triggers (SIG's sinusoid, LF's filtered noise) live here, where pixel-wise search is noisy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onp.probes.families import Range, l2_ball, pixel_scale


class LowFrequency:
    name = "low_frequency"
    learning_rate = 0.1
    radius = 5.0
    """L2 bound of the perturbation on 32x32 images with pixels in [0, 1]."""
    frequencies = 16

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        rows, columns = min(self.frequencies, shape[1]), min(self.frequencies, shape[2])
        return [torch.randn(probes, 1, shape[0], rows, columns, generator=generator) * 1e-3]

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        coefficients = parameters[0] * (valid[1] - valid[0])
        rows = dct_basis(coefficients.shape[-2], images.shape[-2]).to(coefficients)
        columns = dct_basis(coefficients.shape[-1], images.shape[-1]).to(coefficients)
        return (images + rows.T @ coefficients @ columns).clamp(*valid)

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        l2_ball(parameters[0], self.radius)

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        return parameters[0].flatten(1).norm(dim=1) / self.radius

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        return parameters[0].flatten(1).norm(dim=1) * 0.04


def dct_basis(frequencies: int, size: int) -> Tensor:
    """The first rows of the orthonormal DCT-II, float32 [frequencies, size], times the root of
    size / 32 so that a coefficient means the same change per pixel at every image size."""
    k = torch.arange(frequencies, dtype=torch.float64)[:, None]
    n = torch.arange(size, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi / size * (n + 0.5) * k) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return (basis * pixel_scale((size, size)) ** 0.5).float()
