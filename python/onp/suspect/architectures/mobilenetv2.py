"""MobileNetV2 (Sandler et al., arXiv 1801.04381) in its common CIFAR form: ReLU, 3x3 stem of
stride 1, and a convolutional shortcut where a block of stride 1 changes the width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import UnsafeOrCorruptModel

from .shapes import Shapes

STRIDES = (1, 1, 2, 2, 1, 2, 1)
"""Stride of each stage's first block; a stage is a run of blocks of one output width."""

STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""(expansion, output width, blocks) of the paper's network."""


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if shortcut:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    """blocks: ``(inputs, middle, outputs, stride, has a shortcut convolution)``."""

    def __init__(
        self,
        stem: int,
        blocks: Sequence[tuple[int, int, int, int, bool]],
        last: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layers = nn.Sequential(*(InvertedResidual(*block) for block in blocks))
        self.conv2 = nn.Conv2d(blocks[-1][2], last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layers(out)
        out = F.relu(self.bn2(self.conv2(out)))
        return self.linear(self.avgpool(out).flatten(1))


def from_shapes(shapes: Shapes) -> nn.Module:
    """The MobileNetV2 that weights of these shapes belong to."""
    shapes.of("layers.0.conv1.weight", 4)
    rows: list[tuple[int, int, int, bool]] = []
    while f"layers.{len(rows)}.conv1.weight" in shapes:
        prefix = f"layers.{len(rows)}"
        middle, inputs = shapes.of(f"{prefix}.conv1.weight", 4)[:2]
        outputs = shapes.of(f"{prefix}.conv3.weight", 4)[0]
        rows.append((inputs, middle, outputs, f"{prefix}.shortcut.0.weight" in shapes))
    counts = [blocks for _, _, blocks in STAGES]
    if len(rows) != sum(counts):  # another depth: a new width is a new stage
        counts = [len(list(run)) for _, run in groupby(rows, key=lambda row: row[2])]
    if len(counts) > len(STRIDES):
        raise UnsafeOrCorruptModel(
            f"not a {shapes.arch}: {len(counts)} stages of blocks, expected at most {len(STRIDES)}"
        )
    strides = [s for stage, n in enumerate(counts) for s in (STRIDES[stage], *[1] * (n - 1))]
    blocks = [
        (inputs, middle, outputs, stride, shortcut)
        for (inputs, middle, outputs, shortcut), stride in zip(rows, strides, strict=True)
    ]
    stem, last = shapes.of("conv1.weight", 4)[0], shapes.of("conv2.weight", 4)[0]
    return MobileNetV2(stem, blocks, last, shapes.of("linear.weight", 2)[0])


def of_width(multiplier: float, classes: int) -> nn.Module:
    """A fresh MobileNetV2 whose widths are the paper's times ``multiplier``."""

    def wide(channels: int) -> int:
        return max(8, round(channels * multiplier))

    stem = inputs = wide(32)
    blocks = []
    for stage, (expansion, width, count) in enumerate(STAGES):
        for index in range(count):
            stride = 1 if index else STRIDES[stage]
            outputs = wide(width)
            shortcut = stride == 1 and inputs != outputs
            blocks.append((inputs, inputs * expansion, outputs, stride, shortcut))
            inputs = outputs
    return MobileNetV2(stem, blocks, wide(1280), classes)
