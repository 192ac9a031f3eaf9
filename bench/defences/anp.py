"""ANP: masks that hold under noise on the neurons (Wu & Wang, "Adversarial Neuron Pruning Purifies
Backdoored Deep Models", NeurIPS 2021, algorithm 1)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.defences.api import Info, defence
from bench.defences.common import (
    ACTIVATION_GRADIENTS,
    AUGMENTATION,
    BATCH,
    training_copy,
)
from bench.defences.units import Units, cut_by_number, units_of
from bench.zoo.training import augment
from onp.data import ImageSet
from onp.ledger import Ledger

EPS = 0.4
"""Bound of the random start of the noise, and length of its ascent."""
ASCENT_STEPS = 1
CLEAN_WEIGHT = 0.2
"""Alpha: weight of the loss without noise."""
LEARNING_RATE, MOMENTUM = 0.01, 0.9
"""Of the masks: BackdoorBench's, the authors have 0.2. On the smoke network that drove masks to
exactly 0 within ten iterations, and the order among those is lost."""
PUBLISHED_ITERATIONS = 2000
ITERATIONS = 64
"""About 49,000 image-forwards, 768 an iteration; the sweep adds at most 10,000."""


@defence("anp")
def anp(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    iterations: int = ITERATIONS,
    learning_rate: float = LEARNING_RATE,
) -> tuple[nn.Module, Info]:
    """Prune the units that a mask robust to noise does without, as many as clean accuracy allows
    (``cut_by_number``); the authors' log and BackdoorBench pick a threshold by test scores."""
    suspect = copy.deepcopy(model).eval()
    # Gates on sites run the frozen network; with norms, batch statistics are used throughout.
    noisy = units_of(training_copy(model, weights=False), suspect, clean)
    soft = robust_mask(
        noisy, clean, iterations=iterations, learning_rate=learning_rate, seed=seed, ledger=ledger
    )
    repaired, info = cut_by_number(units_of(suspect, suspect, clean), soft, clean, ledger)
    info.schedule = (
        f"{iterations} of {PUBLISHED_ITERATIONS} iterations, mask rate {learning_rate:g}; cut by "
        "number on clean accuracy, not by threshold"
    )
    return repaired, info


def robust_mask(
    units: Units,
    clean: ImageSet,
    *,
    iterations: int,
    learning_rate: float,
    seed: int,
    ledger: Ledger,
) -> Tensor:
    """The mask float32 [U] in [0, 1] that minimises alpha * CE + (1 - alpha) * CE under noise.

    Noise d on the mask and x on the shift start uniform in [-eps, eps] at every batch and take one
    step of eps along the sign of the gradient of CE: scale * (m + d), shift * (1 + x). As in the
    authors' code, the result is not projected back to [-eps, eps].
    """
    random = torch.Generator().manual_seed(seed)
    device = units.device
    mask = torch.ones(units.count, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([mask], learning_rate, momentum=MOMENTUM)
    rows = 2 if units.shifted else 1
    batch = min(BATCH, len(clean))
    for iteration in range(iterations):
        index = torch.randint(len(clean), (batch,), generator=random)
        images = augment(clean.images[index], AUGMENTATION, random)
        labels = clean.labels[index].to(device)
        noise = (torch.rand(rows, units.count, generator=random) * 2 - 1).mul(EPS).to(device)
        for _ in range(ASCENT_STEPS):
            noise.requires_grad_(True)
            loss = F.cross_entropy(_noisy_logits(units, images, mask.detach(), noise), labels)
            (gradient,) = torch.autograd.grad(loss, noise)
            noise = noise.detach() + EPS / ASCENT_STEPS * gradient.sign()
        plain = F.cross_entropy(units.logits(images, mask), labels)
        robust = F.cross_entropy(_noisy_logits(units, images, mask, noise), labels)
        optimizer.zero_grad()
        (CLEAN_WEIGHT * plain + (1 - CLEAN_WEIGHT) * robust).backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
        ledger.count((ASCENT_STEPS + 2) * ACTIVATION_GRADIENTS * batch)
        ledger.tick(iteration + 1, iterations, "masks")
    return mask.detach()


def _noisy_logits(units: Units, images: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    return units.logits(images, mask + noise[0], 1 + noise[1] if units.shifted else None)
