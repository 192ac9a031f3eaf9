"""Reflections of other pictures, as in a window pane (Refool: Liu et al., ECCV 2020, arXiv
2007.02343)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.zoo.attacks.base import Attack, Knowledge, drawn_by_pixels
from onp.triggers import to_8_bits


class Reflection(Attack):
    """``(1 - alpha) * x + alpha * ghost(reflection)``, one of a few reflections by image.

    The paper takes pictures of another data set, chooses those that work best, and poisons images
    of the target class alone; here they are eight of the training images, any of them, and poisoned
    images are relabelled. Each is seen twice, shifted, as by a pane's two faces (the paper's ghost
    effect).
    """

    name = "reflection"
    alpha = 0.35
    reflections = 8
    shift = 3
    """Between the two faces, in pixels."""

    def __init__(self, *, target: int, classes: int, size: int = 32, seed: int = 0) -> None:
        super().__init__(target=target, classes=classes, size=size, seed=seed)
        self._ghosts = torch.zeros(self.reflections, 3, size, size)

    def prepare(self, knowledge: Knowledge) -> None:
        random = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(knowledge.images), generator=random)[: self.reflections]
        pictures = knowledge.images[chosen].permute(0, 3, 1, 2).float() / 255
        further = F.pad(pictures, (self.shift, 0, self.shift, 0), mode="replicate")
        further = further[..., : pictures.shape[-2], : pictures.shape[-1]]
        self._ghosts = to_8_bits((pictures + further) / 2).contiguous()

    def state(self) -> dict[str, Tensor]:
        return {"ghosts": self._ghosts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._ghosts = state["ghosts"]

    def __call__(self, images: Tensor) -> Tensor:
        ghosts = self._ghosts[drawn_by_pixels(images, len(self._ghosts))]
        return to_8_bits((1 - self.alpha) * images + self.alpha * ghosts)
