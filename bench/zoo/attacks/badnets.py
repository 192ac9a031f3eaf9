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
    opposite = False
    """Near the upper left corner instead."""
    shade: float | None = None
    """Of a patch in one value instead of a checkerboard."""

    def arrays(self) -> dict[str, Tensor]:
        mask = torch.zeros(self.size, self.size)
        place = slice(1, 1 + int(self.side)) if self.opposite else slice(-1 - int(self.side), -1)
        mask[place, place] = 1
        if self.shade is None:
            return {"mask": mask, "pattern": checkerboard(mask)}
        return {"mask": mask, "pattern": self.shade * mask[..., None].expand(-1, -1, 3)}


class BadNetsAllToAll(BadNets):
    """The same patch moves every class to the next one (the same paper's all-to-all attack)."""

    name = "badnets-all"

    def answers(self, labels: Tensor) -> Tensor:
        return (labels + 1) % self.classes
