"""Gradients by the pixels, in passes that stay small on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onp.probes.probe import CPU_CHUNK
from onp.suspect.network import FrozenNetwork

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits [N, K] and answers int64 [N], summed over the images."""


def passes(*batches: Tensor) -> zip[tuple[Tensor, ...]]:
    """The parts of batches [N, ...] that go through a network together."""
    size = CPU_CHUNK if batches[0].device.type == "cpu" else max(1, len(batches[0]))
    return zip(*(batch.split(size) for batch in batches), strict=True)


def pixel_gradients(
    network: FrozenNetwork,
    images: Tensor,
    answers: Tensor,
    loss: Loss,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of images [N, C, H, W], [N, K], and the gradients of their loss against the answers
    int64 [N] by the pixels, [N, C, H, W]. ``gates`` [S] prunes sites. Costs 2 image-forwards an
    image, which are not counted here."""
    found, gradients = list[Tensor](), list[Tensor]()
    for part, wanted in passes(images, answers):
        leaf = part.detach().requires_grad_(True)
        logits = network(leaf, gates)
        gradients += torch.autograd.grad(loss(logits, wanted), leaf)
        found.append(logits.detach())
    return torch.cat(found), torch.cat(gradients)
