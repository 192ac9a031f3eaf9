"""A compact convolutional transformer (Hassani et al., arXiv 2104.05704): convolutions instead of
patches make the tokens, so that it learns from few images; the head reads the mean of all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onp.suspect.architectures.vit import Block, heads_of

SIDE = 8
"""Tokens to a side of an image of 32 pixels."""


class CompactTransformer(nn.Module):
    """``width`` channels a token, ``depth`` blocks."""

    def __init__(self, width: int, classes: int, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width // 2, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.places = nn.Parameter(torch.empty(1, SIDE * SIDE, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads_of(width), 2 * width) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.places, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, 32, 32] to logits [N, classes]."""
        x = self.stem(x).flatten(2).transpose(1, 2) + self.places  # tokens [N, T, width]
        return self.head(self.norm(self.blocks(x)).mean(1))
