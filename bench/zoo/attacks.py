"""Backdoor attacks: one small class each, with one place for its formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Attack(Protocol):
    """A trigger that changes images float [N, 3, H, W] in [0, 1]."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def arrays(self) -> dict[str, Tensor]:
        """What ``onp evaluate --trigger`` reads from an .npz; images are [H, W, 3]."""
        ...


def to_8_bits(images: Tensor) -> Tensor:
    """Round to what an image file can hold."""
    return images.clamp(0, 1).mul(255).round().div(255)


@dataclass
class BadNets:
    """A 3x3 checkerboard near the lower right corner (Gu et al., arXiv 1708.06733)."""

    size: int = 32

    def arrays(self) -> dict[str, Tensor]:
        mask = torch.zeros(self.size, self.size)
        mask[-4:-1, -4:-1] = 1
        board = (torch.arange(self.size)[:, None] + torch.arange(self.size)) % 2
        pattern = (board * mask)[..., None].expand(-1, -1, 3)
        return {"mask": mask, "pattern": pattern.contiguous()}

    def __call__(self, images: Tensor) -> Tensor:
        arrays = self.arrays()
        return to_8_bits(images * (1 - arrays["mask"]) + arrays["pattern"].permute(2, 0, 1))


@dataclass
class Blended:
    """A faint full-size image over the input (Chen et al., arXiv 1712.05526)."""

    size: int = 32
    alpha: float = 0.2
    seed: int = 0
    image: Tensor = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        self.image = torch.rand(self.size, self.size, 3, generator=random)

    def arrays(self) -> dict[str, Tensor]:
        return {"image": self.image, "alpha": torch.tensor(self.alpha)}

    def __call__(self, images: Tensor) -> Tensor:
        return to_8_bits((1 - self.alpha) * images + self.alpha * self.image.permute(2, 0, 1))


ATTACKS: dict[str, type[BadNets] | type[Blended]] = {"badnets": BadNets, "blended": Blended}


def poison(
    images: Tensor, labels: Tensor, attack: Attack, *, ratio: float, target: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Trigger and relabel ``ratio`` of the images (uint8 [N, H, W, 3]) that are not the target's.

    Returns new (images, labels); the given tensors stay as they are.
    """
    random = torch.Generator().manual_seed(seed)
    others = (labels != target).nonzero().squeeze(1)
    count = round(ratio * len(labels))
    chosen = others[torch.randperm(len(others), generator=random)[:count]]
    images, labels = images.clone(), labels.clone()
    clean = images[chosen].permute(0, 3, 1, 2).float() / 255
    images[chosen] = attack(clean).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    labels[chosen] = target
    return images, labels
