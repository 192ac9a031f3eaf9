"""Every defence on every architecture of the zoo: it repairs, or says why it does not apply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bench.defences import DEFENCES
from bench.defences.api import NotApplicable
from bench.zoo.architectures import ARCHITECTURES
from onp.config import BUDGETS, AftercareConfig
from onp.data import ImageSet
from onp.demo.images import draw
from onp.ledger import Ledger

WIDTHS = {"mobilenetv2": 0.25, "mobilenetv3": 0.25, "vit": 16, "cct": 16, "densenet": 4}
WITHOUT_BATCH_NORM = {"vgg11", "vit", "cct", "convnext"}
NEEDS_BATCH_NORM = {"clp", "bnp", "onp-recalibrate"}

_QUICK = BUDGETS["quick"]
_ONP: dict[str, Any] = {
    "budget": replace(
        _QUICK, synthesis=replace(_QUICK.synthesis, steps=2, renewal_steps=1, images_per_step=4)
    )
}  # fmt: skip
SHORT: dict[str, dict[str, Any]] = {
    "ft": {"epochs": 1},
    "fp": {"epochs": 1},
    "nad": {"epochs": 1, "teacher_epochs": 1},
    "anp": {"iterations": 1},
    "rnp": {"recovery_epochs": 1},
    "i-bau": {"rounds": 1},
    "ft-sam": {"epochs": 1},
    "nc": {"steps": 2, "search_forwards": 200, "epochs": 1},
    "probe-race": {"steps": 2, "draw": 4},
    "onp": _ONP,
    "onp-quick": _ONP,
    "onp-thorough": _ONP,
    "onp-recalibrate": _ONP,
    "onp-finetune": _ONP,
    "onp-quick-finetune": _ONP,
    "probe-tune": {"config": replace(_ONP["budget"], aftercare=AftercareConfig(epochs=1))},
}
"""Options that leave one round of everything."""


def _case(arch: str) -> tuple[nn.Module, ImageSet]:
    """A network with random weights, and images with its own answers as labels."""
    torch.manual_seed(0)
    model = ARCHITECTURES[arch](WIDTHS.get(arch, 8), 4).train()
    images = draw(24, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = max(module.momentum or 0.0, 0.1)
    with torch.no_grad():
        for _ in range(3):
            model(images.floats())  # norms learn their statistics
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.normal_(last.weight, std=5.0)
        logits = model.eval()(images.floats())
        last.bias -= logits.mean(0)  # so that more than one class is answered
        labels = model(images.floats()).argmax(1)
    return model, ImageSet(images.images, labels)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_treats_every_architecture(name: str, arch: str) -> None:
    model, clean = _case(arch)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = SHORT.get(name, {})
    ledger = Ledger()
    if name in NEEDS_BATCH_NORM and arch in WITHOUT_BATCH_NORM:
        with pytest.raises(NotApplicable, match="batch norm"):
            DEFENCES[name](model, clean, seed=0, ledger=ledger, **options)
        return
    if (name, arch) == ("i-bau", "mobilenetv3"):
        with pytest.raises(NotApplicable, match="second derivatives"):
            DEFENCES[name](model, clean, seed=0, ledger=ledger, **options)
        return
    repaired, info = DEFENCES[name](model, clean, seed=0, ledger=ledger, **options)
    assert repaired is not model
    assert not repaired.training
    assert repaired(clean.floats()).isfinite().all()
    assert info.schedule
    assert (ledger.total > 0) == (name != "clp")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{name} changed {key}"
