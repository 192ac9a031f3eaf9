"""Ten classes of drawn shapes: deterministic, licence-free 32x32 RGB images.

Each image is a textured background and one filled shape of random place, size, turn and colour,
under noise. Shapes are drawn from signed distances on the pixel grid. The same seed gives the same
images (to a rounding of the last bit between machines).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onp.data import ImageSet

CLASSES = (
    "disc", "ring", "square", "frame", "triangle", "cross", "stripes", "dots", "star", "crescent",
)  # fmt: skip
SIZE = 32


def draw(count: int, seed: int) -> ImageSet:
    """``count`` images, classes in turn; the same (count, seed) gives the same images."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=random) * (high - low) + low

    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    centre = uniform(11, 21, 2)
    radius = uniform(6.5, 10.5, 1, 1)
    angle = uniform(0, 6.2832, 1, 1)
    dx = axis[None, None, :] - centre[:, 0, None, None]
    dy = axis[None, :, None] - centre[:, 1, None, None]
    x = (dx * angle.cos() + dy * angle.sin()) / radius  # [N, 32, 32], the shape's own frame
    y = (dy * angle.cos() - dx * angle.sin()) / radius
    coverage = _coverage(labels, x, y, radius)[:, None]

    colour, other = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    gap = (colour - other).abs().mean(1, keepdim=True)
    other = torch.where(gap < 0.25, 1 - colour, other)  # keep the shape visible
    slope = uniform(-0.25, 0.25, 3, 1, 2)
    ramp = (axis / SIZE - 0.5).view(1, 1, 1, SIZE)
    background = other + slope[..., :1] * ramp + slope[..., 1:] * ramp.transpose(2, 3)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=random) * uniform(0.02, 0.12, 1, 1, 1)
    image = background * (1 - coverage) + colour * coverage + noise
    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8)
    return ImageSet(pixels.permute(0, 2, 3, 1).contiguous(), labels, CLASSES)


def _coverage(labels: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel the class's shape covers, [N, 32, 32] in [0, 1].

    x, y: the pixel in the shape's frame, where the shape is about one unit in radius.
    """
    r = (x * x + y * y).sqrt()
    box = torch.maximum(x.abs(), y.abs())
    theta = torch.atan2(y, x)
    wave = (x * 7).sin()
    distance = torch.stack(  # signed, negative inside, one row a class
        [
            r - 0.9,
            (r - 0.75).abs() - 0.2,
            box - 0.8,
            (box - 0.7).abs() - 0.18,
            torch.maximum(-y - 0.5, (x.abs() * 0.866 + y * 0.5) - 0.5),
            torch.minimum(
                torch.maximum(x.abs() - 0.25, y.abs() - 0.95),
                torch.maximum(y.abs() - 0.25, x.abs() - 0.95),
            ),
            torch.maximum(r - 1.0, wave * 0.2),
            torch.maximum(r - 1.05, 0.1 - (x * 5).sin() * (y * 5).sin() * 0.35),
            r - 0.55 - 0.4 * (theta * 5).cos(),
            torch.maximum(r - 0.95, 0.75 - ((x - 0.5) ** 2 + y * y).sqrt()),
        ]
    )
    own = distance.gather(0, labels.view(1, -1, 1, 1).expand(1, *x.shape)).squeeze(0)
    return (0.5 - own * radius).clamp(0, 1)
