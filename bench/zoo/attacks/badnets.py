"""BadNets: a small opaque patch (Gu et al., arXiv 1708.06733)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class BadNets(Attack):
    """A 3x3 checkerboard near the lower right corner; every other class is sent to the target."""

    name = "badnets"

    def arrays(self) -> dict[str, Tensor]:
        """``mask`` [H, W] and ``pattern`` [H, W, 3], as ``onp evaluate --trigger`` reads them."""
        mask = torch.zeros(self.size, self.size)
        mask[-4:-1, -4:-1] = 1
        board = (torch.arange(self.size)[:, None] + torch.arange(self.size)) % 2
        pattern = (board * mask)[..., None].expand(-1, -1, 3)
        return {"mask": mask, "pattern": pattern.contiguous()}

    def __call__(self, images: Tensor) -> Tensor:
        arrays = self.arrays()
        return to_8_bits(images * (1 - arrays["mask"]) + arrays["pattern"].permute(2, 0, 1))


class BadNetsAllToAll(BadNets):
    """The same patch moves every class to the next one (the same paper's all-to-all attack)."""

    name = "badnets-all"

    def answers(self, labels: Tensor) -> Tensor:
        return (labels + 1) % self.classes
