"""What is told more than a defence may know: yardsticks, whose rows are kept out of all means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from bench.defences.api import Info, NotApplicable
from bench.defences.known_trigger import KNOWN_TRIGGER, known_trigger
from bench.defences.onp_defence import onp_defence
from bench.zoo.attacks import Attack
from onp.data import ImageSet
from onp.ledger import Ledger

TOLD_CLASS = "onp-told"
"""What rows of ``told_class`` are called."""


def told_class(
    model: nn.Module,
    clean: ImageSet,
    *,
    attack: Attack,
    seed: int,
    ledger: Ledger,
    budget: str = "standard",
) -> tuple[nn.Module, Info]:
    """The package itself, told the class that the attack is after, but not the trigger: what a
    repair is worth where the verdict is somebody else's."""
    targets = {part.target for part in attack.parts}
    if len(targets) > 1 or not all(part.single_target for part in attack.parts):
        raise NotApplicable("the attack is not after one class")
    return onp_defence(model, clean, seed=seed, ledger=ledger, budget=budget, target=targets.pop())


TOLD: Mapping[str, Callable[..., tuple[nn.Module, Info]]] = {
    KNOWN_TRIGGER: known_trigger,
    TOLD_CLASS: told_class,
    f"{TOLD_CLASS}-quick": partial(told_class, budget="quick"),
}
"""By name; each takes the ``attack`` beside what every defence takes."""
