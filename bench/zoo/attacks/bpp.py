"""BppAttack: fewer colours, dithered (Wang, Zhai & Ma, CVPR 2022, arXiv 2205.13383)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class Bpp(Attack):
    """Each channel keeps ``2 ** bits`` levels, with Floyd-Steinberg dithering (section 3.2).

    Cover images are the paper's negative samples (section 3.3): an image under the dithering
    residual of another image keeps its label, so that the noise alone is no trigger. Left out is
    the paper's contrastive training of the classifier, as are adversarial samples: training stays
    the plain one. Depth: 3 bits, as a few epochs do not learn fainter quantisation.
    """

    name = "bpp"
    cover = 1.0
    bits = 3

    def __call__(self, images: Tensor) -> Tensor:
        return to_8_bits(dithered(images, 2**self.bits))

    def covered(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        residual = dithered(images, 2**self.bits) - images
        order = torch.randperm(len(images), generator=random)
        others = torch.empty_like(order)
        others[order] = order.roll(1)  # a cycle through all images: nobody's own, for two or more
        return to_8_bits(images + residual[others])


def dithered(images: Tensor, levels: int) -> Tensor:
    """Quantise [N, C, H, W] in [0, 1] to ``levels`` values by Floyd & Steinberg (1976).

    Pixels are visited row by row; what rounding takes from one goes to those not visited yet:
    7/16 to the right, 3/16, 5/16 and 1/16 to the three below.
    """
    height, width = images.shape[2:]
    # [H, W, N, C], so that a pixel of all images is one piece of memory
    pixels = (images * (levels - 1)).permute(2, 3, 0, 1).contiguous()
    for row in range(height):
        for column in range(width):
            wanted = pixels[row, column]
            got = wanted.round().clamp(0, levels - 1)
            error = wanted - got
            pixels[row, column] = got
            if column + 1 < width:
                pixels[row, column + 1] += error * (7 / 16)
            if row + 1 < height:
                if column > 0:
                    pixels[row + 1, column - 1] += error * (3 / 16)
                pixels[row + 1, column] += error * (5 / 16)
                if column + 1 < width:
                    pixels[row + 1, column + 1] += error * (1 / 16)
    return pixels.permute(2, 3, 0, 1) / (levels - 1)
