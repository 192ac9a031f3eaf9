"""ConvNeXt (Liu et al., arXiv 2201.03545) with the authors' key names, for images of any size.

The stem's kernel is its stride; later stages begin with a norm and a 2x2 convolution of stride 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Shapes


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution and an MLP on every pixel, scaled per channel (``gamma``)."""

    def __init__(self, width: int, hidden: int, kernel: int = 7, scaled: bool = True) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, hidden)
        self.pwconv2 = nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.full((width,), LAYER_SCALE)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dwconv(x).permute(0, 2, 3, 1)
        out = self.pwconv2(F.gelu(self.pwconv1(self.norm(out))))
        if self.gamma is not None:
            out = self.gamma * out
        return x + out.permute(0, 3, 1, 2)


LAYER_SCALE = 0.1
"""Where ``gamma`` begins; the paper's 1e-6 is for deeper networks and hundreds of epochs."""


class ConvNeXt(nn.Module):
    """blocks[s] holds stage s's ``(width, hidden, kernel, has a layer scale)``."""

    def __init__(
        self, patch: int, blocks: Sequence[Sequence[tuple[int, int, int, bool]]], classes: int
    ) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        inputs = 3
        for stage, rows in enumerate(blocks):
            outputs = rows[0][0]
            if stage == 0:
                conv = nn.Conv2d(inputs, outputs, patch, patch)
                before = nn.Sequential(conv, LayerNorm2d(outputs, eps=1e-6))
            else:
                conv = nn.Conv2d(inputs, outputs, 2, 2)
                before = nn.Sequential(LayerNorm2d(inputs, eps=1e-6), conv)
            self.downsample_layers.append(before)
            self.stages.append(nn.Sequential(*(Block(*row) for row in rows)))
            inputs = outputs
        self.norm = nn.LayerNorm(inputs, eps=1e-6)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((2, 3))))


def from_shapes(shapes: Shapes) -> nn.Module:
    """The ConvNeXt that weights of these shapes belong to."""
    patch = shapes.of("downsample_layers.0.0.weight", 4)[2]
    shapes.of("stages.0.0.dwconv.weight", 4)
    blocks: list[list[tuple[int, int, int, bool]]] = []
    while f"stages.{len(blocks)}.0.dwconv.weight" in shapes:
        rows: list[tuple[int, int, int, bool]] = []
        while f"stages.{len(blocks)}.{len(rows)}.dwconv.weight" in shapes:
            prefix = f"stages.{len(blocks)}.{len(rows)}"
            width, _, kernel, _ = shapes.of(f"{prefix}.dwconv.weight", 4)
            hidden = shapes.of(f"{prefix}.pwconv1.weight", 2)[0]
            rows.append((width, hidden, kernel, f"{prefix}.gamma" in shapes))
        blocks.append(rows)
    return ConvNeXt(patch, blocks, shapes.of("head.weight", 2)[0])


def of_width(
    width: int, classes: int, depths: Sequence[int] = (1, 1, 2), patch: int = 2
) -> nn.Module:
    """A fresh ConvNeXt for small images whose first stage is ``width`` wide, each later one twice
    the one before, with MLPs of 4 times the width. Width 32 has 0.37 million parameters."""
    blocks = [
        [(width << stage, 4 * width << stage, 7, True)] * depth
        for stage, depth in enumerate(depths)
    ]
    return ConvNeXt(patch, blocks, classes)
