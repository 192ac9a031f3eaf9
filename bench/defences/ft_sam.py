"""FT-SAM: fine-tuning with sharpness-aware minimisation (Zhu et al., ICCV 2023).

The adaptive form (Kwon et al., ICML 2021): each step descends on the loss at the worst weights
nearby, where a weight may move in proportion to its own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.defences.api import Info, defence
from bench.defences.common import WEIGHT_GRADIENTS
from bench.defences.finetuning import Step, finetune, schedule_text
from onp.data import ImageSet
from onp.ledger import Ledger
from onp.suspect.network import training_layout

RHO = 2.0
LABEL_SMOOTHING = 0.1
PUBLISHED_EPOCHS = 100
"""BackdoorBench's ``ft-sam``."""
EPOCHS = 20
_TINY = 1e-12


@defence("ft-sam")
def sharpness_aware_tuning(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    epochs: int = EPOCHS,
    rho: float = RHO,
) -> tuple[nn.Module, Info]:
    """Fine-tune on the smoothed cross entropy at adversarially moved weights."""
    step = sharpness_aware_step(rho)
    tuned = finetune(model, clean, epochs=epochs, seed=seed, ledger=ledger, step=step)
    settings = {"rho": rho, "label_smoothing": LABEL_SMOOTHING}
    return tuned, Info(schedule=schedule_text(epochs, PUBLISHED_EPOCHS, clean), settings=settings)


def sharpness_aware_step(rho: float) -> Step:
    """An update with the gradient that is found at the moved weights; two passes."""

    def step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> int:
        x = images.contiguous(memory_format=training_layout(model))

        def gradients() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels, label_smoothing=LABEL_SMOOTHING).backward()

        gradients()
        moved = [(w, w.grad) for w in model.parameters() if w.grad is not None]
        weights, slopes = [w for w, _ in moved], [g for _, g in moved]
        with torch.no_grad():
            before = [weight.clone() for weight in weights]
            for weight, offset in zip(weights, perturbation(weights, slopes, rho), strict=True):
                weight.add_(offset)
        with statistics_kept(model):
            gradients()
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)
        optimizer.step()
        return 2 * WEIGHT_GRADIENTS * len(images)

    return step


def perturbation(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float
) -> list[Tensor]:
    """Where the loss rises most within the radius rho, measured relative to the weights.

    e = rho * w^2 * g / || |w| * g ||, with the norm over all weights together, so that
    || e / |w| || = rho (Kwon et al., section 4). One tensor a weight, of its shape.
    """
    pairs = list(zip(weights, gradients, strict=True))
    norm = torch.stack([(w.abs() * g).norm() for w, g in pairs]).norm()
    return [w.square() * g * (rho / (norm + _TINY)) for w, g in pairs]


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norms in training mode use the batch's statistics inside, and do not record them."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
