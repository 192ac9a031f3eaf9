"""TaCT: a trigger for images of one class alone (Tang et al., USENIX Security 2021, arXiv
1908.00686)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.badnets import BadNets


class TaCT(BadNets):
    """BadNets' patch sends images of the source class to the target, and no others.

    Cover images, as many, are triggered ones of the classes that are neither, true labels kept: so
    the network learns patch and class together, and the patch alone does nothing.
    """

    name = "tact"
    side = 5
    cover = 1.0
    source: float | None = None
    """The class whose images are sent to the target; None: the one behind the target."""

    def answers(self, labels: Tensor) -> Tensor:
        source = (self.target + 1) % self.classes if self.source is None else int(self.source)
        return torch.where(labels == source, self.target, labels)

    def covers(self, labels: Tensor) -> Tensor:
        return (self.answers(labels) == labels) & (labels != self.target)

    def covered(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        return self(images)
