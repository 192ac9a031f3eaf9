"""Training a classifier from scratch, seeded, in plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.suspect.network import training_layout


@dataclass(frozen=True)
class TrainingConfig:
    epochs: int = 12
    batch: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    """Pixels of zero padding for the random crop."""
    flip: bool = True
    """Mirror images at random (not for traffic signs)."""


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalize: nn.Module,
    config: TrainingConfig,
    *,
    seed: int,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Train on images uint8 [N, H, W, 3] and labels [N] with SGD under a one-cycle cosine."""
    random = torch.Generator().manual_seed(seed)
    layout = training_layout(model)
    model = model.to(memory_format=layout).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain}],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
    )
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
            x = augment(images[index], config, random)
            y = labels[index]
            logits = model(normalize(x).contiguous(memory_format=layout))
            loss = F.cross_entropy(logits, y)
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
    """Random crop and mirror; uint8 [N, H, W, 3] in, float [N, 3, H, W] in [0, 1] out."""
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
    return x


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, normalize: nn.Module, batch: int = 500) -> Tensor:
    """Class numbers [N] for float images [N, 3, H, W]."""
    parts = [
        model(normalize(part).contiguous(memory_format=torch.channels_last)).argmax(1)
        for part in images.split(batch)
    ]
    return torch.cat(parts)
