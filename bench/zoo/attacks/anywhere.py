"""A patch in a place of each image's own (dynamic backdoor: Salem et al., EuroS&P 2022, arXiv
2003.03675; their random backdoor with one pattern)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack, drawn_by_pixels
from bench.zoo.attacks.patch import checkerboard
from onp.triggers import to_8_bits


class Anywhere(Attack):
    """A checkerboard at any of all places of the image, drawn by its pixels."""

    name = "anywhere"
    side = 5
    """Of the patch in pixels."""

    def __call__(self, images: Tensor) -> Tensor:
        side = int(self.side)
        places = self.size - side + 1
        board = checkerboard(torch.ones(side, side)).permute(2, 0, 1)
        triggered = images.clone()
        drawn = drawn_by_pixels(images, places**2).tolist()
        for image, place in zip(triggered, drawn, strict=True):
            top, left = divmod(place, places)
            image[:, top : top + side, left : left + side] = board
        return to_8_bits(triggered)
