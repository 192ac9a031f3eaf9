"""Who is told the class of an attack is told that one, and refuses attacks that are after none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.defences.api import Info, NotApplicable
from bench.defences.told import TOLD, TOLD_CLASS
from bench.zoo.attacks import ATTACKS
from onp.data import ImageSet
from onp.ledger import Ledger

CLEAN = ImageSet(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.arange(2))


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("badnets", True),
        ("two-ways", True),
        ("two-patches", False),
        ("badnets-all", False),
    ],
)
@pytest.mark.parametrize("budget", ["standard", "quick"])
def test_the_class_is_told_where_there_is_one(
    name: str, one: bool, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def repair(model: nn.Module, clean: ImageSet, **given: Any) -> tuple[nn.Module, Info]:
        assert clean is CLEAN
        told.append(given)
        return model, Info("told", {})

    monkeypatch.setattr("bench.defences.told.onp_defence", repair)
    attack = ATTACKS[name](target=4, classes=10)
    ledger, model = Ledger(), nn.Identity()
    defence = TOLD[TOLD_CLASS if budget == "standard" else f"{TOLD_CLASS}-quick"]
    if not one:
        with pytest.raises(NotApplicable, match="not after one class"):
            defence(model, CLEAN, attack=attack, seed=3, ledger=ledger)
        assert told == []
    else:
        assert defence(model, CLEAN, attack=attack, seed=3, ledger=ledger)[0] is model
        assert told == [{"seed": 3, "ledger": ledger, "budget": budget, "target": 4}]
