"""One synthesised trigger, and the answer that it is after."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from onp.probes.families import Family, Range

CPU_CHUNK = 128
"""Images in one pass on a CPU: the memory of larger activations goes back to the system after every
step; from 512 images on each takes half as long again."""


@dataclass(frozen=True)
class LabelShift:
    """All-to-all: of ``classes`` labels each is to become the one ``by`` further on (BadNets, Gu et
    al., arXiv 1708.06733, section 4)."""

    classes: int
    by: int = 1

    def __str__(self) -> str:
        return f"label+{self.by}"


@dataclass(frozen=True)
class OneClass:
    """Images of one class alone are to become another, and all others stay what they are (TaCT,
    Tang et al., arXiv 1908.00686)."""

    source: int
    target: int

    def __str__(self) -> str:
        return f"{self.source}->{self.target}"


Target = int | LabelShift | OneClass
"""A class (all-to-one), a shift of the labels (all-to-all), or a class for another's images."""


def classes_of(target: Target) -> list[int]:
    """The classes that triggered images are to get."""
    if isinstance(target, LabelShift):
        return list(range(target.classes))
    return [target.target if isinstance(target, OneClass) else target]


def answers_of(target: Target, labels: Tensor) -> Tensor:
    """What triggered images with labels int64 [N] are to get: int64 [N]."""
    if isinstance(target, LabelShift):
        return (labels + target.by) % target.classes
    if isinstance(target, OneClass):
        return torch.where(labels == target.source, target.target, labels)
    return torch.full_like(labels, target)


class Trigger(Protocol):
    """What stands for an attacker's trigger: a change of images, and the answers it is after."""

    def wanted(self, labels: Tensor) -> Tensor:
        """The answers for images with labels int64 [N]: int64 [N]."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Trigger images float32 [N, C, H, W]."""
        ...


def after_one_class(trigger: Trigger) -> bool:
    """Whether it works on one class's images alone, which then stand for all."""
    return isinstance(trigger, Probe) and isinstance(trigger.target, OneClass)


@dataclass(frozen=True, eq=False)
class Probe:
    """One synthesised trigger: a function of images that should make ``target`` the answer."""

    family: Family = field(repr=False)
    target: Target
    parameters: list[Tensor] = field(repr=False)
    """Each with a leading dimension of 1."""
    valid: Range
    size: float
    """Share of the family's bound or reference size."""

    @property
    def name(self) -> str:
        return f"{self.family.name}->{self.target}"

    def wanted(self, labels: Tensor) -> Tensor:
        """The answer it is after for images with labels int64 [N]: int64 [N]. Images that have it
        as their label say nothing about the trigger."""
        return answers_of(self.target, labels)

    def to(self, device: torch.device) -> Probe:
        """With its parameters on a device."""
        return replace(self, parameters=[one.to(device) for one in self.parameters])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Trigger images float32 [N, C, H, W], on their device."""
        parameters = [parameter.to(images.device) for parameter in self.parameters]
        size = CPU_CHUNK if images.device.type == "cpu" else max(len(images), 1)
        parts = [
            self.family.apply(parameters, part[None], self.valid)[0] for part in images.split(size)
        ]
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Strengthened:
    """A probe that changes pixels by several multiples of its change, in turn."""

    probe: Probe
    strengths: tuple[float, ...]

    def wanted(self, labels: Tensor) -> Tensor:
        """As the probe's."""
        return self.probe.wanted(labels)

    def __call__(self, images: Tensor) -> Tensor:
        """Trigger images float32 [N, C, H, W], image i by ``strengths[i % len(strengths)]``."""
        strengths = torch.tensor(self.strengths)[torch.arange(len(images)) % len(self.strengths)]
        weights = strengths.view(-1, 1, 1, 1).to(images.device)
        changed = images.lerp(self.probe(images), weights)
        return changed.clamp(*self.probe.valid)
