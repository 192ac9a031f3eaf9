"""FP: prune units that sleep on clean images, then fine-tune (Liu et al., "Fine-Pruning: Defending
Against Backdooring Attacks on Deep Neural Networks", RAID 2018, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.defences.api import Info, NotApplicable, defence
from bench.defences.common import accuracy, logits_on
from bench.defences.finetuning import finetune, schedule_text
from onp.data import ImageSet
from onp.ledger import Ledger

STEP = 0.01
"""Share of the units pruned at a time."""
RELATIVE_LIMIT = 0.1
"""Pruning stops before the clean accuracy has lost this share of itself: BackdoorBench's rule, kept
on the clean set where BackdoorBench reads the test set and keeps the network past the limit."""
PUBLISHED_EPOCHS = 100
EPOCHS = 40


@defence("fp")
def fp(
    model: nn.Module, clean: ImageSet, *, seed: int, ledger: Ledger, epochs: int = EPOCHS
) -> tuple[nn.Module, Info]:
    """Prune dormant inputs of the last linear layer, then fine-tune all weights but those."""
    pruned, name, keep = prune_dormant(model, clean, ledger)
    layer = pruned.get_submodule(name)
    parametrize.register_parametrization(layer, "weight", _KeptColumns(keep))
    tuned = finetune(pruned, clean, epochs=epochs, seed=seed, ledger=ledger)
    layer = tuned.get_submodule(name)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    settings = {"layer": name, "pruned": int((~keep).sum()), "units": len(keep)}
    schedule = f"fine-tuning: {schedule_text(epochs, PUBLISHED_EPOCHS, clean)}"
    return tuned, Info(schedule=schedule, settings=settings)


@torch.no_grad()
def prune_dormant(
    model: nn.Module, clean: ImageSet, ledger: Ledger
) -> tuple[nn.Module, str, Tensor]:
    """A copy in eval mode with the columns of dormant inputs zeroed in the last linear layer, that
    layer's name, and which inputs it keeps, bool [C].

    Inputs go in order of their mean on the clean images, smallest first, a hundredth at a time; the
    last network within the limit is kept. One pass over the images: what a pruning answers is
    computed from the layer's inputs.
    """
    pruned = copy.deepcopy(model).eval()
    name, features, logits = logit_layer(pruned, clean.floats(), ledger)
    layer = pruned.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    order = features.mean(0).argsort(stable=True)
    before = accuracy(logits, clean.labels)
    weight, bias = layer.weight.cpu(), 0 if layer.bias is None else layer.bias.cpu()
    width = features.shape[1]
    keep = torch.ones(width, dtype=torch.bool)
    step = ceil(STEP * width)
    for count in range(step, width, step):
        trial = torch.ones(width, dtype=torch.bool)
        trial[order[:count]] = False
        after = accuracy((features * trial) @ weight.T + bias, clean.labels)
        if before - after >= RELATIVE_LIMIT * before:
            break
        keep = trial
    layer.weight[:, ~keep] = 0
    return pruned, name, keep


@torch.no_grad()
def logit_layer(model: nn.Module, images: Tensor, ledger: Ledger) -> tuple[str, Tensor, Tensor]:
    """The linear layer that gives the logits: its name, its inputs [N, C] on the images, and the
    logits [N, K]. Raises NotApplicable where the last linear layer that runs is none."""
    last: dict[str, Any] = {}
    features: list[Tensor] = []

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            last.update(name=name, inputs=args[0], output=output)

        return hook

    def keep(_model: nn.Module, _args: Any, output: Tensor) -> None:
        if not last or last["inputs"].ndim != 2 or not torch.equal(last["output"], output):
            raise NotApplicable("FP prunes a last linear layer; the logits come from none")
        features.append(last["inputs"].float().cpu())

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    handles.append(model.register_forward_hook(keep))
    try:
        logits = logits_on(model, images, ledger)
    finally:
        for handle in handles:
            handle.remove()
    return last["name"], torch.cat(features), logits


class _KeptColumns(nn.Module):
    """A weight [K, C] with the columns that were pruned held at zero."""

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep.to(weight.device)
