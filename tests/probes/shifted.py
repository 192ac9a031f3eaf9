"""Networks whose batch norms remember other images, and the measured shift."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from onp import demo
from onp.ledger import Ledger
from onp.probes.norm_shift import NormShift, norm_shift
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace
from onp.triggers import load_trigger


def triggered(images: Tensor) -> Tensor:
    """With the trigger that the demo's network knows."""
    return load_trigger(str(demo.TRIGGER))(images)


def seen(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with running statistics taken anew over images, in one batch."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> NormShift:
    frozen = FrozenNetwork(trace(model, (3, 32, 32)), model)
    ledger = Ledger()
    shift = norm_shift(frozen, model, images, labels, valid=(0.0, 1.0), seed=0, ledger=ledger)
    assert shift is not None
    assert ledger.total == 4 * len(images)
    return shift
