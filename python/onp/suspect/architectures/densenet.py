"""DenseNet-BC (Huang et al., arXiv 1608.06993) with torchvision's key names.

A stem with a norm of its own is ImageNet's (stride 2, max pool); without one it is CIFAR's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Shapes


class DenseLayer(nn.Module):
    """Bottleneck layer whose ``growth`` new channels join the ones that it read."""

    def __init__(self, inputs: int, middle: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out)))
        return torch.cat([x, out], 1)


class Transition(nn.Module):
    """Fewer channels at half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.norm(x))))


class DenseNet(nn.Module):
    """blocks[b] holds block b's layers, each ``(inputs, middle, growth)``; transitions[b] is
    ``(inputs, outputs)`` of what stands between blocks b and b + 1."""

    def __init__(
        self,
        stem: tuple[int, int],
        blocks: Sequence[Sequence[tuple[int, int, int]]],
        transitions: Sequence[tuple[int, int]],
        classes: int,
        *,
        large: bool = False,
    ) -> None:
        super().__init__()
        width, kernel = stem
        self.features = nn.Sequential()
        stride = 2 if large else 1
        conv = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.features.add_module("conv0", conv)
        if large:
            self.features.add_module("norm0", nn.BatchNorm2d(width))
            self.features.add_module("relu0", nn.ReLU())
            self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for number, rows in enumerate(blocks, start=1):
            block = nn.Sequential()
            for index, row in enumerate(rows, start=1):
                block.add_module(f"denselayer{index}", DenseLayer(*row))
            self.features.add_module(f"denseblock{number}", block)
            if number <= len(transitions):
                self.features.add_module(
                    f"transition{number}", Transition(*transitions[number - 1])
                )
        inputs, _, growth = blocks[-1][-1]
        self.features.add_module("norm5", nn.BatchNorm2d(inputs + growth))
        self.classifier = nn.Linear(inputs + growth, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x))
        return self.classifier(F.adaptive_avg_pool2d(out, 1).flatten(1))


def from_shapes(shapes: Shapes) -> nn.Module:
    """The DenseNet that weights of these shapes belong to."""
    shapes.of("features.denseblock1.denselayer1.conv1.weight", 4)
    blocks: list[list[tuple[int, int, int]]] = []
    while f"features.denseblock{len(blocks) + 1}.denselayer1.conv1.weight" in shapes:
        rows: list[tuple[int, int, int]] = []
        block = f"features.denseblock{len(blocks) + 1}"
        while f"{block}.denselayer{len(rows) + 1}.conv1.weight" in shapes:
            layer = f"{block}.denselayer{len(rows) + 1}"
            middle, inputs = shapes.of(f"{layer}.conv1.weight", 4)[:2]
            rows.append((inputs, middle, shapes.of(f"{layer}.conv2.weight", 4)[0]))
        blocks.append(rows)
    transitions = []
    for number in range(1, len(blocks)):
        outputs, inputs = shapes.of(f"features.transition{number}.conv.weight", 4)[:2]
        transitions.append((inputs, outputs))
    width, _, kernel, _ = shapes.of("features.conv0.weight", 4)
    return DenseNet(
        (width, kernel),
        blocks,
        transitions,
        shapes.of("classifier.weight", 2)[0],
        large="features.norm0.weight" in shapes,
    )


def of_width(width: int, classes: int, depths: Sequence[int] = (8, 8, 8)) -> nn.Module:
    """A fresh CIFAR DenseNet-BC of growth rate ``width``: bottlenecks of 4, a stem of 2 times the
    growth rate, transitions that halve the channels. Width 16 has 0.46 million parameters."""
    channels = 2 * width
    blocks: list[list[tuple[int, int, int]]] = []
    transitions: list[tuple[int, int]] = []
    for depth in depths:
        if blocks:
            transitions.append((channels, channels // 2))
            channels //= 2
        rows = []
        for _ in range(depth):
            rows.append((channels, 4 * width, width))
            channels += width
        blocks.append(rows)
    return DenseNet((2 * width, 3), blocks, transitions, classes)
