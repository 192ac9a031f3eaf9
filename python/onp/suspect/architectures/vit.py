"""Vision transformer (Dosovitskiy et al., arXiv 2010.11929) with timm's key names.

A class token among the weights is what the head reads; without one it reads the mean of all
tokens. The number of heads is no weight's shape: see ``heads_of``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import UnsafeOrCorruptModel

from .shapes import Shapes


class Attention(nn.Module):
    """Multi-head self-attention over tokens [N, T, C]."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, T, C / heads] each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Images [N, 3, H, W] to tokens [N, T, C], one for each patch."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """hidden[b] is the width of block b's MLP; ``positions`` counts the class token."""

    def __init__(
        self,
        width: int,
        patch: int,
        positions: int,
        hidden: Sequence[int],
        classes: int,
        *,
        class_token: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        heads = heads_of(width)
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.blocks = nn.Sequential(*(Block(width, heads, h, qkv_bias) for h in hidden))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0] if self.cls_token is not None else x.mean(1))


def heads_of(width: int) -> int:
    """Attention heads of a ViT of this width: of 64 channels each, as in the paper, from width 192
    on, and 4 below."""
    return width // 64 if width >= 192 else 4


def from_shapes(shapes: Shapes) -> nn.Module:
    """The ViT that weights of these shapes belong to."""
    width, _, patch, _ = shapes.of("patch_embed.proj.weight", 4)
    if width % heads_of(width):
        raise UnsafeOrCorruptModel(
            f"not a {shapes.arch}: a width of {width} does not split into {heads_of(width)} heads"
        )
    shapes.of("blocks.0.mlp.fc1.weight", 2)
    hidden: list[int] = []
    while f"blocks.{len(hidden)}.mlp.fc1.weight" in shapes:
        hidden.append(shapes.of(f"blocks.{len(hidden)}.mlp.fc1.weight", 2)[0])
    return ViT(
        width,
        patch,
        shapes.of("pos_embed", 3)[1],
        hidden,
        shapes.of("head.weight", 2)[0],
        class_token="cls_token" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
    )


def of_width(
    width: int,
    classes: int,
    depth: int = 6,
    *,
    size: int = 32,
    patch: int = 4,
    class_token: bool = True,
) -> nn.Module:
    """A fresh ViT for images of ``size`` x ``size`` pixels with MLPs of 4 times the width. Width 64
    has 0.31 million parameters, 96 has 0.68. ``width`` must be a multiple of ``heads_of(width)``.
    """
    positions = (size // patch) ** 2 + class_token
    return ViT(width, patch, positions, [4 * width] * depth, classes, class_token=class_token)
