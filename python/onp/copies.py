"""Few clean images made more of: copies, moved, turned, scaled and lit otherwise.

What a mask does to images that nobody gave is a handful of images' luck where they are few. Copies
that the network answers as it answers the image tell more of it, and are all that can be had; what
is gained, and that it is lost in the noise where images are many: bench/NOTES.md, "Copies".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.clean import Clean
from onp.config import CopiesConfig
from onp.evaluate import MaskEvaluator
from onp.probes.families import Range


def with_copies(
    clean: Clean, evaluator: MaskEvaluator, config: CopiesConfig, *, valid: Range, seed: int
) -> Clean:
    """The clean images, first, and copies of them until there are ``config.enough``.

    One that is answered otherwise than its image is left out: a backdoor may answer to being moved
    (WaNet). Costs an image-forward a copy, ``config.tries`` times as many copies as are wanted at
    most; fewer than these may be left.
    """
    random = torch.Generator().manual_seed(seed)
    parts = [clean]
    lacking = config.enough - len(clean)
    for _ in range(config.tries * math.ceil(lacking / len(clean))):
        if lacking <= 0:
            break
        images = moved(clean.images, config, valid, random)
        copies = Clean.seen_by(evaluator, images, clean.labels)
        alike = (copies.answers == clean.answers).nonzero().squeeze(1)[:lacking]
        parts.append(copies[alike])
        lacking -= len(alike)
    return Clean(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.original for part in parts]),
    )


def moved(images: Tensor, config: CopiesConfig, valid: Range, random: torch.Generator) -> Tensor:
    """Each of the images float32 [N, C, H, W] otherwise, at random: shifted, turned and scaled
    about its middle, mirrored beyond its edges, with another contrast and brightness. The same
    shape, within ``valid``."""
    count, _, height, width = images.shape

    def upto(most: float, *shape: int) -> Tensor:
        return most * (2 * torch.rand(count, *shape, generator=random) - 1)

    turn, scale = upto(config.turn), 1 + upto(config.scale)
    along, across = scale * turn.cos(), scale * turn.sin()
    shift = 2 * upto(config.shift, 2)  # of an axis that goes from -1 to 1
    places = torch.stack(
        [
            torch.stack([along, -across * height / width, shift[:, 0]], 1),
            torch.stack([across * width / height, along, shift[:, 1]], 1),
        ],
        1,
    )  # [N, 2, 3]
    grid = F.affine_grid(places, list(images.shape), align_corners=False)
    there = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    contrast = 1 + upto(config.light, 1, 1, 1)
    brightness = upto(config.light / 2, 1, 1, 1) * (valid[1] - valid[0])
    mean = there.mean((1, 2, 3), keepdim=True)
    return (contrast * (there - mean) + mean + brightness).clamp(*valid)
