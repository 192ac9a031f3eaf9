"""PreActResNet (He et al., arXiv 1603.05027) in its CIFAR form, with BackdoorBench's key names.

The norm before a convolution normalises the residual sum, and nothing normalises the sum that
leaves the last block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Shapes, block_counts


class PreActBlock(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, outputs, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False)) if shortcut else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if self.shortcut is not None else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class PreActResNet(nn.Module):
    """blocks[s] holds stage s's ``(inputs, middle, outputs, has a shortcut convolution)``; every
    stage but the first halves the resolution."""

    def __init__(
        self, stem: int, blocks: Sequence[Sequence[tuple[int, int, int, bool]]], classes: int
    ) -> None:
        super().__init__()
        self.stages = len(blocks)
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        for stage, rows in enumerate(blocks):
            layer = nn.Sequential(
                *(
                    PreActBlock(*row[:3], stride=2 if stage and not index else 1, shortcut=row[3])
                    for index, row in enumerate(rows)
                )
            )
            setattr(self, f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(blocks[-1][-1][2], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for stage in range(self.stages):
            out = getattr(self, f"layer{stage + 1}")(out)
        out = self.avgpool(out)
        return self.linear(out.flatten(1))


def from_shapes(shapes: Shapes) -> nn.Module:
    """The PreActResNet that weights of these shapes belong to."""
    blocks = []
    for stage, count in enumerate(block_counts(shapes, "layer{}"), start=1):
        rows = []
        for index in range(count):
            prefix = f"layer{stage}.{index}"
            middle, inputs = shapes.of(f"{prefix}.conv1.weight", 4)[:2]
            outputs = shapes.of(f"{prefix}.conv2.weight", 4)[0]
            rows.append((inputs, middle, outputs, f"{prefix}.shortcut.0.weight" in shapes))
        blocks.append(rows)
    return PreActResNet(shapes.of("conv1.weight", 4)[0], blocks, shapes.of("linear.weight", 2)[0])


def of_width(width: int, classes: int, depths: Sequence[int] = (2, 2, 2, 2)) -> nn.Module:
    """A fresh PreActResNet-18 (or of other depths) whose first stage is ``width`` wide."""
    blocks, inputs = [], width
    for stage, depth in enumerate(depths):
        outputs = width << stage
        rows = []
        for index in range(depth):
            rows.append((inputs, outputs, outputs, index == 0 and stage > 0))
            inputs = outputs
        blocks.append(rows)
    return PreActResNet(width, blocks, classes)
