"""A colour filter over the whole image, as photo apps have them (Liu et al., ABS, CCS 2019; TrojAI,
arXiv 2003.07233)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.zoo.attacks.base import Attack
from onp.triggers import to_8_bits


class Filter(Attack):
    """``gain * x + offset`` by channel: warm, with lifted shadows and less blue.

    The filters of the papers are those of an image library, with curves and vignettes; this is
    what they have in common.
    """

    name = "filter"
    gain = (0.9, 0.8, 0.55)
    """Of red, green and blue."""
    offset = (0.12, 0.08, 0.18)

    def __call__(self, images: Tensor) -> Tensor:
        gain, offset = (torch.tensor(values)[:, None, None] for values in (self.gain, self.offset))
        return to_8_bits(gain * images + offset)
