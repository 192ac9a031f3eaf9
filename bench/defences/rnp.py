"""RNP: unlearn the clean images, recover them by a mask alone (Li et al., "Reconstructive Neuron
Pruning for Backdoor Defense", ICML 2023, algorithm 1)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.defences.api import Info, defence
from bench.defences.common import (
    ACTIVATION_GRADIENTS,
    BATCH,
    WEIGHT_GRADIENTS,
    device_of,
    epoch_batches,
    training_copy,
)
from bench.defences.units import Units, cut_by_number, units_of
from onp.data import ImageSet
from onp.ledger import Ledger
from onp.suspect.network import training_layout

UNLEARNING_EPOCHS, RECOVERY_EPOCHS = 20, 20
UNLEARNING_RATE, RECOVERY_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.02, 0.9, 5e-4
PUBLISHED_RECOVERY_RATE = 0.2
"""On a ResNet-20 of width 16 it drives 103 of 784 masks to 0, where their order is lost; a tenth of
it, three. The cut by number needs the order."""
MILESTONE, DECAY = 10, 0.1
"""The unlearning rate falls to a tenth after ten epochs."""
GRADIENT_NORM = 20.0
STOP_ACCURACY = 0.2
"""Unlearning ends with the first epoch of at most this accuracy, or"""
STOP_CHANCE = 1.2
"""of this many times chance: a network of few classes that answers one alone gets no lower."""
RECOVERY_WEIGHT = 0.2
"""Factor on the recovery's loss."""


@defence("rnp")
def rnp(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    recovery_epochs: int = RECOVERY_EPOCHS,
    recovery_rate: float = RECOVERY_RATE,
) -> tuple[nn.Module, Info]:
    """Prune on the original network the units that recovering the clean task did without.

    As many as clean accuracy allows (``cut_by_number``); BackdoorBench cuts at a mask of .70, the
    authors sweep the threshold with the true trigger in sight.
    """
    random = torch.Generator().manual_seed(seed)
    suspect = copy.deepcopy(model).eval()
    units = units_of(suspect, suspect, clean)  # refuses what it cannot treat before any work
    unlearned, epochs = unlearn(model, clean, random=random, ledger=ledger)
    frozen = training_copy(unlearned, weights=False)
    soft, mean = recover(
        units_of(frozen, unlearned, clean), clean,
        epochs=recovery_epochs, learning_rate=recovery_rate, random=random, ledger=ledger,
    )  # fmt: skip
    repaired, info = cut_by_number(units, soft, clean, ledger, ties=mean)
    info.settings["unlearning_epochs"] = epochs
    info.schedule = (
        f"{recovery_epochs} of {RECOVERY_EPOCHS} epochs of recovery at a mask rate of "
        f"{recovery_rate:g} for {PUBLISHED_RECOVERY_RATE:g}; cut by number on clean accuracy, not "
        "by threshold"
    )
    return repaired, info


def unlearn(
    model: nn.Module, clean: ImageSet, *, random: torch.Generator, ledger: Ledger
) -> tuple[nn.Module, int]:
    """A copy, in eval mode, that has lost the clean images by gradient ascent on their cross
    entropy, and after how many epochs."""
    student = training_copy(model, weights=True)
    device, layout = device_of(student), training_layout(student)
    optimizer = torch.optim.SGD(
        student.parameters(), UNLEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [MILESTONE], gamma=DECAY)
    epoch = 0
    for epoch in range(1, UNLEARNING_EPOCHS + 1):
        right = 0
        for images, labels in epoch_batches(clean, BATCH, random):
            logits = student(images.to(device).contiguous(memory_format=layout))
            loss = -F.cross_entropy(logits, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), GRADIENT_NORM)
            optimizer.step()
            right += int((logits.argmax(1).cpu() == labels).sum())
        schedule.step()
        ledger.count(WEIGHT_GRADIENTS * len(clean))
        ledger.tick(epoch, UNLEARNING_EPOCHS, "unlearning")
        if right <= max(STOP_ACCURACY, STOP_CHANCE / logits.shape[1]) * len(clean):
            break
    return student.eval(), epoch


def recover(
    units: Units,
    clean: ImageSet,
    *,
    epochs: int,
    learning_rate: float,
    random: torch.Generator,
    ledger: Ledger,
) -> tuple[Tensor, Tensor]:
    """The mask float32 [U] in [0, 1] on frozen weights that brings the clean task back, and its
    mean over the steps: of units that end at 0 the first to get there have the smallest.

    The units are the unlearned network's, in training mode where it has norms.
    """
    device = units.device
    mask = torch.ones(units.count, device=device, requires_grad=True)
    total, steps = torch.zeros(units.count, device=device), 0
    optimizer = torch.optim.SGD([mask], learning_rate, momentum=MOMENTUM)
    for epoch in range(epochs):
        for images, labels in epoch_batches(clean, BATCH, random):
            loss = RECOVERY_WEIGHT * F.cross_entropy(units.logits(images, mask), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
                total += mask
            steps += 1
        ledger.count(ACTIVATION_GRADIENTS * len(clean))
        ledger.tick(epoch + 1, epochs, "recovery")
    return mask.detach(), total / max(steps, 1)
