"""After pruning, for those who ask: norm statistics and weights brought in line.

Neither is part of the method, and no figure of the method's holds them. Pruned sites stay pruned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.answers import harm, margin
from onp.config import AftercareConfig
from onp.errors import UsageError
from onp.ledger import Ledger
from onp.metrics import predict
from onp.optimizers import Sgd
from onp.probes.probe import Trigger, after_one_class
from onp.suspect.network import training_layout

_BATCH = 125
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True)
class Aftercare:
    """What is done to the pruned network."""

    recalibrate: bool = False
    """Its norm statistics are estimated anew."""
    finetune: bool = False
    """Then its weights are tuned."""

    def __bool__(self) -> bool:
        return self.recalibrate or self.finetune

    def check(self, model: nn.Module) -> None:
        """Raise UsageError where the network has nothing to recalibrate."""
        if self.recalibrate and not has_statistics(model):
            raise UsageError("recalibrate needs batch norms with running statistics: none here")


@dataclass(frozen=True)
class AftercareOutcome:
    """What came of it."""

    model: nn.Module
    done: Aftercare
    accuracy: float
    """On the clean images, which fine-tuning has seen: no estimate of what it is on others."""


def care_for(
    pruned: nn.Module,
    suspect: nn.Module,
    images: Tensor,
    labels: Tensor,
    probes: Sequence[Trigger],
    wanted: Aftercare,
    config: AftercareConfig,
    *,
    seed: int,
    ledger: Ledger,
) -> AftercareOutcome:
    """Do what is wanted to a copy of ``pruned``; images float32 [N, C, H, W], labels int64 [N];
    probes: the triggers that fine-tuning is to guard against."""
    model = pruned
    if wanted.recalibrate:
        model = recalibrated(model, images, ledger)
    if wanted.finetune:
        model = finetuned(model, suspect, images, labels, probes, config, seed=seed, ledger=ledger)
    ledger.count(len(images))
    accuracy = float((predict(model, images) == labels).float().mean())
    return AftercareOutcome(model, wanted, accuracy)


def has_statistics(model: nn.Module) -> bool:
    """Whether the network has batch norms that ``recalibrated`` could do anything for."""
    return any(isinstance(m, BatchNorm) and m.track_running_stats for m in model.modules())


@torch.no_grad()
def recalibrated(model: nn.Module, images: Tensor, ledger: Ledger) -> nn.Module:
    """A copy of ``model`` whose batch norms' running statistics are those of ``images`` float32
    [N, C, H, W] alone, means over batches of 125 to 249.

    Pruning changes what later layers see; their statistics were made before it. Costs one
    image-forward an image.
    """
    tuned = copy.deepcopy(model).eval()
    norms = [m for m in tuned.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    device = next(tuned.parameters()).device
    for part in images.tensor_split(max(1, len(images) // _BATCH)):
        tuned(part.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    ledger.count(len(images))
    return tuned.eval()


@torch.enable_grad()
def finetuned(
    model: nn.Module,
    suspect: nn.Module,
    images: Tensor,
    labels: Tensor,
    probes: Sequence[Trigger],
    config: AftercareConfig,
    *,
    seed: int,
    ledger: Ledger,
) -> nn.Module:
    """A copy of ``model`` whose weights are tuned on clean images float32 [N, C, H, W] with labels
    int64 [N], towards the labels and towards what the suspect answered before it was pruned; and,
    on the same images each triggered by one of the probes, away from what the trigger wants: tuned
    on clean images alone, what is left of a backdoor grows again. What is minimised is the cost of
    the search (``onp.agent.cost``), but that success is neither capped nor in excess of the clean
    image's.

    SGD with momentum under a cosine; norm statistics stay as they are, and so does every weight
    that is exactly zero, which is how pruned sites are written. Costs 6 image-forwards an image and
    epoch, 3 without probes, and one more an image for the suspect's answers.
    """
    random = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    with torch.no_grad():
        before = torch.cat([suspect(part.to(device)).log_softmax(1) for part in images.split(250)])
    ledger.count(len(images))
    tuned: nn.Module = copy.deepcopy(model).eval().requires_grad_(True)
    layout = training_layout(tuned)
    tuned.to(memory_format=layout)  # type: ignore[call-overload]  # not among torch's overloads
    weights, flags = list(tuned.parameters()), [p.requires_grad for p in model.parameters()]
    alive = [(weight != 0).detach() for weight in weights]
    optimizer = Sgd(weights, config.learning_rate, config.momentum)
    batches = -(-len(images) // config.batch)
    steps = batches * config.epochs
    alone = any(map(after_one_class, probes))
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=random)
        for number, index in enumerate(order.tensor_split(batches), epoch * batches):
            shown, right = images[index], labels[index]
            if probes:
                hands = torch.randint(len(probes), (len(index),), generator=random)
                hit, wanted = triggered(shown, right, probes, hands)
                shown = torch.cat([shown, hit])
            logits = tuned(shown.to(device).contiguous(memory_format=layout))
            clean, hit = logits[: len(index)], logits[len(index) :]
            right = right.to(device)
            loss = harm(clean.log_softmax(1), right, before[index.to(device)])
            if probes:
                loss = loss + config.success_weight * success(hit, wanted.to(device), right, alone)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, config.steepest)
            optimizer.rate = config.learning_rate * (1 + math.cos(math.pi * number / steps)) / 2
            optimizer.step()
            with torch.no_grad():
                for weight, kept in zip(weights, alive, strict=True):
                    weight.mul_(kept)
            ledger.count(3 * len(shown))
            ledger.tick(number + 1, steps)
    for weight, flag in zip(weights, flags, strict=True):
        weight.grad = None
        weight.requires_grad_(flag)
    tuned.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as above
    return tuned


def success(hit: Tensor, wanted: Tensor, right: Tensor, alone: bool) -> Tensor:
    """What triggered images' logits [N, K] give of what they want, int64 [N], in nats an image;
    nothing where that is the label. alone: one class's images stand for all, as in the search."""
    others = wanted != right
    turned = (F.softplus(margin(hit, wanted)) * others).mean()
    return turned * (len(others) / max(int(others.sum()), 1)) if alone else turned


@torch.no_grad()
def triggered(
    images: Tensor, labels: Tensor, probes: Sequence[Trigger], hands: Tensor
) -> tuple[Tensor, Tensor]:
    """Images float32 [N, C, H, W] with labels int64 [N], each with the trigger of the probe that
    its hand int64 [N] names, and the answers int64 [N] that these want."""
    shown, wanted = torch.empty_like(images), torch.empty_like(labels)
    for number, probe in enumerate(probes):
        own = hands == number
        if bool(own.any()):
            shown[own], wanted[own] = probe(images[own]), probe.wanted(labels[own])
    return shown, wanted
