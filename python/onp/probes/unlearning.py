"""Unlearn the clean images and see which class is left: a backdoored network keeps its target.

The first step of Reconstructive Neuron Pruning (Li et al., ICML 2023): gradient ascent on the
clean loss. What stays is what the clean images do not speak of.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onp.config import UnlearningConfig
from onp.ledger import Ledger
from onp.optimizers import Sgd
from onp.suspect.network import training_layout


@dataclass(frozen=True)
class Unlearned:
    """The network after unlearning, and what it answers on the clean images."""

    model: nn.Module
    answers: Tensor
    """int64 [K]: how many clean images got each answer."""

    def suspects(self, count: int) -> list[int]:
        """The ``count`` commonest answers, commonest first (ties: lower class)."""
        return self.answers.argsort(descending=True, stable=True)[:count].tolist()


def unlearn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: UnlearningConfig,
    *,
    seed: int,
    ledger: Ledger,
) -> Unlearned:
    """Maximise cross-entropy on images float32 [N, C, H, W] until the accuracy is gone.

    Works on a copy in training mode (batch statistics); gently where there are no batch norms.
    Costs 3 image-forwards an image.
    """
    random = torch.Generator().manual_seed(seed)
    student = copy.deepcopy(model).requires_grad_(True).train()
    for module in student.modules():
        if "Dropout" in type(module).__name__:
            module.eval()  # its noise would draw on the global random state
    if not any(isinstance(module, _BatchNorm) for module in student.modules()):
        config = replace(
            config, learning_rate=config.gentle_rate, gradient_norm=config.gentle_norm,
            max_steps=config.gentle_steps,
        )  # fmt: skip
    optimizer = Sgd(student.parameters(), config.learning_rate, config.momentum)
    batch = min(config.batch, len(images))
    device = next(student.parameters()).device
    layout = training_layout(student)
    for step in range(config.max_steps):
        index = torch.randperm(len(images), generator=random)[:batch]
        logits = student(images[index].to(device).contiguous(memory_format=layout))
        target = labels[index].to(device)
        optimizer.zero_grad()
        (-F.cross_entropy(logits, target)).backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.gradient_norm)
        optimizer.step()
        ledger.count(3 * batch)
        ledger.tick(step + 1, config.max_steps)
        if (logits.argmax(1) == target).float().mean() <= config.stop_accuracy:
            break
    student.eval()
    with torch.no_grad():
        answers = torch.cat(
            [student(part.to(device)).argmax(1).cpu() for part in images.split(250)]
        )
    ledger.count(len(images))
    return Unlearned(student, torch.bincount(answers, minlength=logits.shape[1]))
