"""Training a classifier from scratch, seeded, in plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.attacks import Attack
from bench.zoo.augmentation import Augmentation
from onp.suspect.network import training_layout


@dataclass(frozen=True)
class TrainingConfig:
    epochs: int = 12
    batch: int = 128
    optimizer: str = "sgd"
    """``sgd``, or ``adamw`` for networks with layer norms."""
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    """Pixels of zero padding for the random crop."""
    flip: bool = True
    """Mirror images at random (not for traffic signs)."""
    more: Augmentation = field(default_factory=Augmentation)

    @classmethod
    def of_card(cls, told: dict[str, Any]) -> TrainingConfig:
        """As a card tells it; older ones tell of less."""
        return cls(**(told | {"more": Augmentation(**told.get("more", {}))}))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: TrainingConfig,
    *,
    seed: int,
    attack: Attack | None = None,
    ratio: float = 0.0,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Train on images uint8 [N, H, W, 3] and labels [N], seeded, under a one-cycle cosine.

    ``model`` takes images float [N, 3, H, W] in [0, 1] and is trained in place, where it is.
    An ``attack`` that is online learns beside it and poisons ``ratio`` of every batch.
    """
    random = torch.Generator().manual_seed(seed)
    layout = training_layout(model)
    device = next(model.parameters()).device
    model = model.to(memory_format=layout).train()
    optimizer = _optimizer(model, config)
    steps = config.epochs * (len(labels) // config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(steps, 1), pct_start=0.2
    )
    started = time.perf_counter()
    for epoch in range(config.epochs):
        order = torch.randperm(len(labels), generator=random)
        losses, right = 0.0, 0
        for step in range(len(labels) // config.batch):
            index = order[step * config.batch : (step + 1) * config.batch]
            x = augment(images[index], config, random).to(device)
            y = labels[index].to(device)
            if attack is not None and attack.online:
                x, y = attack.batch(model, x, y, ratio, random)
            x, other, share = config.more.mixed(x, y, random)
            logits = model(x.contiguous(memory_format=layout))
            loss = F.cross_entropy(logits, y, label_smoothing=config.more.smoothing)
            if share < 1:
                mixed = F.cross_entropy(logits, other, label_smoothing=config.more.smoothing)
                loss = share * loss + (1 - share) * mixed
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item()
            right += int((logits.argmax(1) == y).sum())
        seen = max(len(labels) // config.batch, 1)
        log(
            f"epoch {epoch + 1}/{config.epochs} loss {losses / seen:.3f} "
            f"accuracy {right / (seen * config.batch):.3f} {time.perf_counter() - started:.0f} s"
        )
    return model.eval()


def augment(images: Tensor, config: TrainingConfig, random: torch.Generator) -> Tensor:
    """Random crop, mirror and more; uint8 [N, H, W, 3] in, float [N, 3, H, W] in [0, 1] out."""
    x = images.permute(0, 3, 1, 2).float() / 255
    count, _, height, width = x.shape
    pad = config.crop_padding
    if pad:
        x = F.pad(x, (pad, pad, pad, pad))
        top = torch.randint(0, 2 * pad + 1, (count, 1), generator=random)
        left = torch.randint(0, 2 * pad + 1, (count, 1), generator=random)
        rows = (top + torch.arange(height))[:, None, :, None]
        columns = (left + torch.arange(width))[:, None, None, :]
        each = torch.arange(count)[:, None, None, None]
        x = x[each, torch.arange(3)[None, :, None, None], rows, columns]
    if config.flip:
        mirrored = torch.rand(count, generator=random) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return config.more(x, random)


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Weight decay on weight matrices and kernels alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1],
         "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]  # fmt: skip
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True)
