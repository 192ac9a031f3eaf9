"""NAD: Neural Attention Distillation (Li et al., ICLR 2021).

A fine-tuned copy teaches the suspect where to look: beside the cross entropy, the student's
attention maps are drawn to the teacher's.

Maps are the outputs [N, C, H, W] of the blocks or stages that end each of the last three spatial
resolutions above 1x1, as the paper and BackdoorBench take them from a ResNet: of the last module
with children that gives an output of the resolution, unless that is what a norm gave, before its
activation. Where no module with children gives one (a VGG is one flat nn.Sequential), the last
module without counts. On a network of tokens (the members of some nn.Sequential or nn.ModuleList
all give [N, T, D]) maps are taken from the last three members of the outermost such stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.defences.api import Info, NotApplicable, defence
from bench.defences.common import FORWARD, WEIGHT_GRADIENTS
from bench.defences.finetuning import Step, finetune, schedule_text
from onp.data import ImageSet
from onp.ledger import Ledger
from onp.suspect.network import training_layout

TEACHER_EPOCHS = 10
EPOCHS = 10
"""The paper, section 4.1, and BackdoorBench's ``nad``."""
BETAS = (500.0, 1000.0, 1000.0)
"""Weights of the maps' distances, first map to last: BackdoorBench's ``nad``."""
POWER = 2
"""p in the sum of |F|^p over the channels: the paper, section 3.2."""
BATCH = 64

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
"""Their outputs of four dimensions are [N, H, W, C]: no maps (ConvNeXt has such)."""


@defence("nad")
def attention_distillation(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    teacher_epochs: int = TEACHER_EPOCHS,
    epochs: int = EPOCHS,
) -> tuple[nn.Module, Info]:
    """Fine-tune a teacher, then tune the suspect on the cross entropy and the teacher's maps.

    Raises NotApplicable for a network without feature maps or tokens.
    """
    teacher = finetune(
        model, clean, epochs=teacher_epochs, seed=seed, ledger=ledger, batch=BATCH
    ).requires_grad_(False)
    step = distillation_step(teacher)
    student = finetune(
        model, clean, epochs=epochs, seed=seed + 1, ledger=ledger, batch=BATCH, step=step
    )
    taught = schedule_text(teacher_epochs, TEACHER_EPOCHS, clean, BATCH)
    drawn = schedule_text(epochs, EPOCHS, clean, BATCH)
    return student, Info(schedule=f"teacher: {taught}; student: {drawn}")


def distillation_step(teacher: nn.Module) -> Step:
    """An update on the cross entropy and the distance to the maps of the frozen ``teacher``."""

    def step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> int:
        x = images.contiguous(memory_format=training_layout(model))
        with torch.no_grad(), listening(teacher) as heard:
            teacher(x)
            taught = heard.attention()
        with listening(model) as heard:
            logits = model(x)
            loss = F.cross_entropy(logits, labels) + distance(heard.attention(), taught)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (FORWARD + WEIGHT_GRADIENTS) * len(images)

    return step


def attention_map(features: Tensor) -> Tensor:
    """Where the network looks: float [N, P], each row of L2 norm 1 over the P positions.

    features: [N, C, H, W], or tokens [N, T, D]. The sum of |F|^p over the channels (the paper's
    equation 1, A_sum^p).
    """
    channels = 1 if features.ndim == 4 else 2
    return F.normalize(features.abs().pow(POWER).sum(channels).flatten(1), dim=1)


def distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The weighted mean squared differences of up to three maps, a scalar."""
    betas = BETAS[-len(student) :]
    terms = [
        beta * F.mse_loss(one, other)
        for beta, one, other in zip(betas, student, teacher, strict=True)
    ]
    return torch.stack(terms).sum()


class Heard:
    """The outputs of a network's modules in one forward pass, as far as maps need them."""

    def __init__(self, stacks: list[nn.Sequential | nn.ModuleList]) -> None:
        """stacks: whose members' tokens to keep, outer ones first."""
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._leaves: dict[tuple[int, int], Tensor] = {}
        self._normed: Tensor | None = None
        self._tokens: dict[nn.Module, list[Tensor]] = {stack: [] for stack in stacks}

    def map(self, module: nn.Module, output: object) -> None:
        """Keep a feature map until a later one of its resolution comes from a module of its kind,
        with children or without."""
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2:].numel() == 1:
            return
        size = output.shape[2], output.shape[3]
        if next(module.children(), None) is None:
            self._leaves[size] = output
            self._normed = output if isinstance(module, _NORMS) else None
        elif output is not self._normed:
            self._blocks[size] = output

    def member(self, stack: nn.Module, output: object) -> None:
        """Keep what a member of a stack gave, if it gave tokens."""
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] > 1:
            self._tokens[stack].append(output)

    def attention(self) -> list[Tensor]:
        """The attention maps, first to last; at most as many as there are BETAS."""
        return [attention_map(features) for features in self._features()]

    def _features(self) -> list[Tensor]:
        count = len(BETAS)
        for stack, outputs in self._tokens.items():
            if len(outputs) == len(list(stack.children())) > 1:
                return outputs[-count:]
        maps = self._leaves | self._blocks
        if not maps:
            raise NotApplicable("NAD needs feature maps or tokens, and the network has neither")
        by_area = sorted(maps, key=lambda size: -size[0] * size[1])
        return [maps[size] for size in by_area[-count:]]


@contextmanager
def listening(model: nn.Module) -> Iterator[Heard]:
    """Hear the modules' outputs while inside."""
    modules = list(model.modules())
    stacks = [module for module in modules if isinstance(module, nn.Sequential | nn.ModuleList)]
    heard = Heard(stacks)
    handles = [
        module.register_forward_hook(lambda module, _inputs, output: heard.map(module, output))
        for module in modules
        if type(module) not in _CHANNELS_LAST
    ]
    for stack in stacks:
        hook = _member_hook(heard, stack)
        handles += [member.register_forward_hook(hook) for member in stack]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _member_hook(heard: Heard, stack: nn.Module) -> Callable[[nn.Module, object, object], None]:
    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        heard.member(stack, output)

    return hook
