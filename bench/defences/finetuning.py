"""The fine-tuning loop that the tuning defences share: SGD on a few clean images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.defences.common import BATCH, WEIGHT_GRADIENTS, device_of, epoch_batches
from onp.data import ImageSet
from onp.ledger import Ledger
from onp.suspect.network import training_layout

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
"""BackdoorBench's settings of every defence that fine-tunes."""
PUBLISHED_UPDATES = 10
"""In an epoch of BackdoorBench: 5% of CIFAR-10, which are 2,500 images, in batches of 256."""

Step = Callable[[nn.Module, Optimizer, Tensor, Tensor], int]
"""One update of the network in training mode, from augmented images float [B, 3, H, W] in [0, 1]
and labels int64 [B]; gives the image-forwards that it ran."""


def finetune(
    model: nn.Module,
    clean: ImageSet,
    *,
    epochs: int,
    seed: int,
    ledger: Ledger,
    learning_rate: float = 0.01,
    batch: int = BATCH,
    step: Step | None = None,
) -> nn.Module:
    """A copy of ``model``, all weights tuned on ``clean``, in eval mode.

    SGD with momentum under a cosine from ``learning_rate`` to 0 over all steps; random crops.
    An epoch is cut into batches of even size, at most ``batch``. ``step`` replaces the update on
    the cross entropy.
    """
    update = step or cross_entropy_step
    random = torch.Generator().manual_seed(seed)
    layout = training_layout(model)
    tuned: nn.Module = copy.deepcopy(model).requires_grad_(True).train()
    tuned.to(memory_format=layout)  # type: ignore[call-overload]  # not among torch's overloads
    device = device_of(tuned)
    optimizer = torch.optim.SGD(
        tuned.parameters(), learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    batches = ceil(len(clean) / batch)
    steps = epochs * batches
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global state
        torch.manual_seed(seed)
        for epoch in range(epochs):
            for number, (images, labels) in enumerate(epoch_batches(clean, batch, random)):
                ledger.count(update(tuned, optimizer, images.to(device), labels.to(device)))
                schedule.step()
                ledger.tick(epoch * batches + number + 1, steps, "fine-tuning")
    return tuned.eval()


def schedule_text(epochs: int, published: int, clean: ImageSet, batch: int = BATCH) -> str:
    """A schedule beside the ``published`` epochs, in words: with fewer images and other batches,
    epochs alone would compare unequal numbers of updates."""
    updates = epochs * ceil(len(clean) / batch)
    return (
        f"{epochs} of {published} epochs, {updates} updates in batches of up to {batch} "
        f"(on 5% of CIFAR-10: {published * PUBLISHED_UPDATES} in batches of 256)"
    )


def cross_entropy_step(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor
) -> int:
    """The plain update: one descent on the cross entropy of the batch."""
    logits = model(images.contiguous(memory_format=training_layout(model)))
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return WEIGHT_GRADIENTS * len(images)
