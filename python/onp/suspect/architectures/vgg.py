"""VGG (Simonyan & Zisserman, arXiv 1409.1556), with or without batch norm, CIFAR or larger.

The layout is read from the numbering in ``features.<n>.weight``: a gap after a convolution and
its ReLU is a max pool. The classifier is one linear layer or ``classifier.{0,3,6}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn

from onp.errors import UnsafeOrCorruptModel

from .shapes import Shapes

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions per stage of the named variants."""


class VGG(nn.Module):
    """stages[s] lists the widths of stage s's convolutions; each stage ends in a 2x2 max pool."""

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        classes: int,
        *,
        norm: bool,
        pooled: int = 1,
        hidden: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in stages:
            for width in stage:
                layers.append(nn.Conv2d(inputs, width, 3, 1, 1))
                if norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                inputs = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        features = inputs * pooled * pooled
        if hidden is None:
            self.classifier: nn.Module = nn.Linear(features, classes)
            return
        head: list[nn.Module] = []
        for width in hidden:
            head += [nn.Linear(features, width), nn.ReLU(), nn.Dropout()]
            features = width
        self.classifier = nn.Sequential(*head, nn.Linear(features, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def from_shapes(shapes: Shapes) -> nn.Module:
    """The VGG that weights of these shapes belong to."""
    numbers = sorted(
        int(found[1])
        for key in shapes.names()
        if (found := re.fullmatch(r"features\.(\d+)\.weight", key))
    )
    shapes.of("features.0.weight", 4)
    norm = "features.1.running_mean" in shapes
    step = 3 if norm else 2
    convs = numbers[::2] if norm else numbers
    stages: list[list[int]] = [[]]
    for here, after in zip(convs, [*convs[1:], None], strict=True):
        stages[-1].append(shapes.of(f"features.{here}.weight", 4)[0])
        if after is not None and after == here + step + 1:
            stages.append([])
        elif after is not None and after != here + step:
            raise UnsafeOrCorruptModel(
                f"not a {shapes.arch}: features.{after} does not follow features.{here}"
            )
    if "classifier.weight" in shapes:
        classes, features = shapes.of("classifier.weight", 2)
        hidden = None
    else:
        heads = [f"classifier.{n}.weight" for n in (0, 3, 6) if f"classifier.{n}.weight" in shapes]
        features = shapes.of("classifier.0.weight", 2)[1]
        *hidden, classes = [shapes.of(key, 2)[0] for key in heads]
    pooled = math.isqrt(max(features // stages[-1][-1], 1))
    return VGG(stages, classes, norm=norm, pooled=pooled, hidden=hidden)


def of_width(width: int, classes: int, depth: int = 11, *, norm: bool = True) -> nn.Module:
    """A fresh VGG of the named depth; stages are width x (1, 2, 4, 8, 8) wide (the paper: 64)."""
    widths = [width * times for times in (1, 2, 4, 8, 8)]
    stages = [[w] * count for w, count in zip(widths, DEPTHS[depth], strict=True)]
    return VGG(stages, classes, norm=norm)
