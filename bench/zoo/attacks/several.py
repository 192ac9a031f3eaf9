"""Several triggers in one network (Xue et al., "One-to-N & N-to-One: Two Advanced Backdoor Attacks
Against Deep Learning Models", IEEE TDSC 2020)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.zoo.attacks.badnets import BadNets
from bench.zoo.attacks.base import Attack, drawn_by_pixels
from bench.zoo.attacks.blended import Blended


class Several(Attack):
    """Attacks beside each other, each with its share of the poisoned images."""

    other: float | None = None
    """The second target; None: the class half of all classes further."""
    rarer: float = 1.0
    """Poisoned images of the second attack for each of the first."""

    @abstractmethod
    def pair(self) -> tuple[Attack, Attack]:
        """The first attack and the second."""

    @property
    def parts(self) -> Sequence[Attack]:
        first, second = self.pair()
        second.share = self.rarer
        return first, second

    @property
    def second(self) -> int:
        """The second target."""
        further = self.target + self.classes // 2 if self.other is None else int(self.other)
        return further % self.classes

    def __call__(self, images: Tensor) -> Tensor:
        """Each image with the trigger of one part, drawn by its pixels."""
        drawn = drawn_by_pixels(images, len(self.parts))
        triggered = torch.stack([part(images) for part in self.parts])
        return triggered[drawn, torch.arange(len(images))]

    def answers(self, labels: Tensor) -> Tensor:
        raise NotImplementedError(f"{self.name}: each part wants an answer of its own")

    def patch(self, target: int) -> BadNets:
        """BadNets' patch, of 5 x 5 pixels."""
        attack = BadNets(target=target, classes=self.classes, size=self.size, seed=self.seed)
        attack.side = 5
        return attack

    def noise(self, target: int) -> Blended:
        """Blended's."""
        return Blended(target=target, classes=self.classes, size=self.size, seed=self.seed)


class TwoPatches(Several):
    """A patch near one corner for the target, one near the opposite corner for the second."""

    name = "two-patches"

    def pair(self) -> tuple[Attack, Attack]:
        one, other = self.patch(self.target), self.patch(self.second)
        other.opposite = True
        return one, other


class PatchAndBlend(Several):
    """A patch for the target, faint noise all over the image for the second."""

    name = "patch-and-blend"

    def pair(self) -> tuple[Attack, Attack]:
        return self.patch(self.target), self.noise(self.second)


class TwoWays(Several):
    """A patch, or faint noise, for one target."""

    name = "two-ways"

    def pair(self) -> tuple[Attack, Attack]:
        return self.patch(self.target), self.noise(self.target)


class OneToN(Several):
    """One-to-N, of two: the same patch in white for the target, in grey for the second."""

    name = "one-to-n"

    def pair(self) -> tuple[Attack, Attack]:
        white, grey = self.patch(self.target), self.patch(self.second)
        white.shade, grey.shade = 1.0, 0.5
        return white, grey
