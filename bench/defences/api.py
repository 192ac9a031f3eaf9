"""The one form of every defence: a network and clean images in, a network and its story out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import nn

from onp.data import ImageSet
from onp.ledger import Ledger


@dataclass
class Info:
    """What a defence tells beside the network it gives back."""

    schedule: str = "as published"
    """How the schedule differs from the authors', in words."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was chosen on clean data: thresholds, classes, counts; JSON-able."""
    candidates: list[tuple[str, Callable[[], nn.Module]]] = field(default_factory=list)
    """The sweep that the choice was made from: (setting, a function that builds the network), so
    that the scoreboard can score the pick with the true trigger as a row marked oracle."""


class Defence(Protocol):
    """Repairs a classifier from clean images alone."""

    def __call__(
        self, model: nn.Module, clean: ImageSet, *, seed: int, ledger: Ledger
    ) -> tuple[nn.Module, Info]:
        """Repair ``model``, which takes images float [N, 3, H, W] in [0, 1] and is not changed.

        Every image-forward is counted in the ledger: a forward is 1, with input gradients 2, with
        weight gradients 3. Raises ``NotApplicable`` for a network the method cannot treat.
        """
        ...


REGISTERED: dict[str, Defence] = {}
"""Defences by name, as their modules are imported."""

Marked = TypeVar("Marked", bound=Defence)


def defence(name: str) -> Callable[[Marked], Marked]:
    """Marks a function as the defence that the scoreboard calls ``name``."""

    def register(function: Marked) -> Marked:
        if name in REGISTERED:
            raise ValueError(f"two defences are called {name!r}")
        REGISTERED[name] = function
        return function

    return register


class NotApplicable(Exception):
    """The method does not apply to this network, and why."""
