"""What every trigger family provides, and the list of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Range = tuple[float, float]


class Family(Protocol):
    """P triggers of one kind, optimised side by side. Parameters lead with dimension P."""

    name: str
    learning_rate: float
    """Adam step size in the units of the parameters."""

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        """Fresh parameters for ``probes`` triggers on images of ``shape`` (C, H, W)."""
        ...

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        """Trigger images [P, n, C, H, W]; the result stays inside the valid pixel range."""
        ...

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        """Bring parameters back inside the family's bound, in place."""
        ...

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        """How large each trigger is, [P], as a share of the family's reference size."""
        ...

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        """What to add to the loss per trigger, [P]; weighted up while the trigger succeeds."""
        ...


def l2_ball(deltas: Tensor, radius: float) -> None:
    """Scale each of deltas [P, ...] to an L2 norm of at most ``radius``, in place."""
    norms = deltas.flatten(1).norm(dim=1).clamp_min(1e-12)
    deltas.mul_((radius / norms).clamp_max(1.0).view(-1, *(1,) * (deltas.ndim - 1)))


def pixel_scale(shape: torch.Size | tuple[int, ...]) -> float:
    """Bounds are stated for 32x32 images; an L2 norm grows with the root of the pixel count."""
    return float((shape[-1] * shape[-2] / 1024) ** 0.5)
