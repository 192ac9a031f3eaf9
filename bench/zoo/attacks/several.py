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
from bench.zoo.attacks.patch import Patch, checkerboard


class Several(Attack):
    """Attacks beside each other, each with its share of the poisoned images."""

    other: float | None = None
    """The second target; None: the class half of all classes further."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Attack]: ...

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
        raise NotImplementedError(f"{self.name}: each of its parts wants an answer of its own")

    def _made(self, kind: type[Attack], target: int) -> Attack:
        attack = kind(target=target, classes=self.classes, size=self.size, seed=self.seed)
        if isinstance(attack, BadNets):
            attack.side = 5
        return attack


class OppositePatch(BadNets):
    """BadNets' patch near the upper left corner, its colours exchanged."""

    name = "badnets-opposite"

    def arrays(self) -> dict[str, Tensor]:
        mask = super().arrays()["mask"].flip(0, 1)
        return {"mask": mask, "pattern": mask[..., None] - checkerboard(mask)}


class GreyPatch(Patch):
    """A plain patch near the lower right corner."""

    name = "grey-patch"
    side = 5
    """In pixels."""
    shade = 1.0
    """Its value."""

    def arrays(self) -> dict[str, Tensor]:
        mask = torch.zeros(self.size, self.size)
        place = slice(-1 - int(self.side), -1)
        mask[place, place] = 1
        return {"mask": mask, "pattern": self.shade * mask[..., None].expand(-1, -1, 3)}


class TwoPatches(Several):
    """A patch in one corner for the target, another in the opposite corner for the second one."""

    name = "two-patches"

    @property
    def parts(self) -> Sequence[Attack]:
        return self._made(BadNets, self.target), self._made(OppositePatch, self.second)


class PatchAndBlend(Several):
    """A patch for the target, faint noise all over the image for the second one."""

    name = "patch-and-blend"

    @property
    def parts(self) -> Sequence[Attack]:
        return self._made(BadNets, self.target), self._made(Blended, self.second)


class TwoWays(Several):
    """A patch, or faint noise, for one target."""

    name = "two-ways"

    @property
    def parts(self) -> Sequence[Attack]:
        return self._made(BadNets, self.target), self._made(Blended, self.target)


class OneToN(Several):
    """One-to-N, of two: the same patch in white for the target and in grey for the second one."""

    name = "one-to-n"

    @property
    def parts(self) -> Sequence[Attack]:
        white, grey = self._made(GreyPatch, self.target), self._made(GreyPatch, self.second)
        assert isinstance(grey, GreyPatch)
        grey.shade = 0.5
        return white, grey
