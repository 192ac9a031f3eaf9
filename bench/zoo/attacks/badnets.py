"""BadNets: a small opaque patch (Gu et al., arXiv 1708.06733)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.patch import Patch, checkerboard


class BadNets(Patch):
    """A checkerboard near the lower right corner; every other class is sent to the target."""

    name = "badnets"
    side = 3
    """Of the patch in pixels."""

    def arrays(self) -> dict[str, Tensor]:
        mask = torch.zeros(self.size, self.size)
        place = slice(-1 - int(self.side), -1)
        mask[place, place] = 1
        return {"mask": mask, "pattern": checkerboard(mask)}


class BadNetsAllToAll(BadNets):
    """The same patch moves every class to the next one (the same paper's all-to-all attack)."""

    name = "badnets-all"

    def answers(self, labels: Tensor) -> Tensor:
        return (labels + 1) % self.classes
