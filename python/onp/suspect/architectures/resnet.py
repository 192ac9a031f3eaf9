"""ResNet with basic blocks (He et al., arXiv 1512.03385) in its CIFAR forms: ResNet-18, ResNet-20.

Two namings are common and both are read: ``shortcut``/``linear`` and ``downsample``/``fc``. A
block whose shape changes without shortcut weights uses option A: every other pixel, new channels
zero, half of them in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import UnsafeOrCorruptModel

from .shapes import Shapes, block_counts


class SubsamplePad(nn.Module):
    """Option-A shortcut: x[:, :, ::stride, ::stride], channel c moved to ``positions[c]``."""

    def __init__(self, positions: Sequence[int], channels: int, stride: int) -> None:
        super().__init__()
        self.positions = list(positions)
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        out = x.new_zeros(x.shape[0], self.channels, x.shape[2], x.shape[3])
        out[:, self.positions] = x
        return out


@dataclass(frozen=True)
class BlockShape:
    inputs: int
    middle: int
    outputs: int
    stride: int
    shortcut: str | None
    """Name of the shortcut convolution's module, if there is one."""


class BasicBlock(nn.Module):
    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape.inputs, shape.middle, 3, shape.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(shape.middle)
        self.conv2 = nn.Conv2d(shape.middle, shape.outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(shape.outputs)
        self.shortcut_name = shape.shortcut or "shortcut"
        shortcut: nn.Module = nn.Identity()
        if shape.shortcut:
            shortcut = nn.Sequential(
                nn.Conv2d(shape.inputs, shape.outputs, 1, shape.stride, bias=False),
                nn.BatchNorm2d(shape.outputs),
            )
        elif shape.stride > 1 or shape.inputs != shape.outputs:
            front = (shape.outputs - shape.inputs) // 2
            shortcut = SubsamplePad(range(front, front + shape.inputs), shape.outputs, shape.stride)
        setattr(self, self.shortcut_name, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + getattr(self, self.shortcut_name)(x))


class ResNet(nn.Module):
    """Every stage but the first halves the resolution; a 7x7 stem brings ImageNet's max pool."""

    def __init__(
        self,
        stem: tuple[int, int],
        blocks: Sequence[Sequence[BlockShape]],
        classes: int,
        head: str = "linear",
    ) -> None:
        super().__init__()
        width, kernel = stem
        self.stages = len(blocks)
        self.head = head
        self.conv1 = nn.Conv2d(3, width, kernel, 2 if kernel > 3 else 1, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if kernel > 3 else nn.Identity()
        for stage, rows in enumerate(blocks):
            setattr(self, f"layer{stage + 1}", nn.Sequential(*map(BasicBlock, rows)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        setattr(self, head, nn.Linear(blocks[-1][-1].outputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            out = getattr(self, f"layer{stage + 1}")(out)
        out = self.avgpool(out).flatten(1)
        return getattr(self, self.head)(out)


def from_shapes(shapes: Shapes) -> nn.Module:
    """The ResNet that weights of these shapes belong to."""
    blocks = []
    for stage, count in enumerate(block_counts(shapes, "layer{}"), start=1):
        rows = []
        for index in range(count):
            prefix = f"layer{stage}.{index}"
            if f"{prefix}.conv3.weight" in shapes:
                raise UnsafeOrCorruptModel(
                    f"not a {shapes.arch}: {prefix}.conv3 belongs to a bottleneck block"
                )
            middle, inputs = shapes.of(f"{prefix}.conv1.weight", 4)[:2]
            outputs = shapes.of(f"{prefix}.conv2.weight", 4)[0]
            shortcut = next(
                (n for n in ("shortcut", "downsample") if f"{prefix}.{n}.0.weight" in shapes), None
            )
            stride = 2 if stage > 1 and index == 0 else 1
            rows.append(BlockShape(inputs, middle, outputs, stride, shortcut))
        blocks.append(rows)
    head = "fc" if "fc.weight" in shapes else "linear"
    width, _, kernel, _ = shapes.of("conv1.weight", 4)
    return ResNet((width, kernel), blocks, shapes.of(f"{head}.weight", 2)[0], head)


def of_width(
    width: int, classes: int, depths: Sequence[int] = (2, 2, 2, 2), option_a: bool = False
) -> nn.Module:
    """A fresh CIFAR ResNet; depths (2, 2, 2, 2) is ResNet-18, (3, 3, 3) is ResNet-20."""
    blocks, inputs = [], width
    for stage, depth in enumerate(depths):
        outputs, rows = width << stage, []
        for index in range(depth):
            stride = 2 if stage and not index else 1
            shortcut = "shortcut" if stride == 2 and not option_a else None
            rows.append(BlockShape(inputs, outputs, outputs, stride, shortcut))
            inputs = outputs
        blocks.append(rows)
    return ResNet((width, 3), blocks, classes)
