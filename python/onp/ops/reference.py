"""Naive twins of every native operation: obvious, slow, and importing torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# ---- message passing ----------------------------------------------------------------------------

# ---- neuron graph -------------------------------------------------------------------------------

# ---- masked forward -----------------------------------------------------------------------------


def masked_forward(
    model: nn.Module,
    layers: Sequence[tuple[slice, Sequence[str]]],
    pruned: Tensor,
    images: Tensor,
) -> Tensor:
    """Logits ``[B, N, K]`` of ``model`` under each of ``pruned`` bool ``[B, S]``.

    A layer is its slice of the sites and the names of the modules that consume it: the pruned
    channels of their input are zeroed. A linear layer behind a flatten has one input for each
    pixel of a channel.
    """

    def logits(mask: Tensor) -> Tensor:
        handles = []
        for sites, consumers in layers:
            keep = (~mask[sites]).to(images.dtype)
            for name in consumers:

                def zero(_: nn.Module, args: tuple[Tensor], keep: Tensor = keep) -> tuple[Tensor]:
                    pixels = args[0].shape[1] // len(keep)
                    shape = (1, -1) + (1,) * (args[0].ndim - 2)
                    return (args[0] * keep.repeat_interleave(pixels).view(shape),)

                handles.append(model.get_submodule(name).register_forward_pre_hook(zero))
        try:
            with torch.no_grad():
                result: Tensor = model(images)
        finally:
            for handle in handles:
                handle.remove()
        return result

    return torch.stack([logits(mask) for mask in pruned])
