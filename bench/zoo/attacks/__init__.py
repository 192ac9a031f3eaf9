"""Backdoor attacks from their papers: one class each, with one place for its formula.

An attack is added by a file in this folder alone: every ``Attack`` with a name is found.
"""

from __future__ import annotations

from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules

from bench.zoo.attacks.base import Attack, Knowledge, poison


def _found() -> dict[str, type[Attack]]:
    """The attacks of the modules in this folder, by name; raises where two share one."""
    found: dict[str, type[Attack]] = {}
    for module in iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if not isinstance(value, type) or not issubclass(value, Attack) or isabstract(value):
                continue
            if found.setdefault(value.name, value) is not value:
                raise ValueError(f"two attacks are called {value.name!r}")
    return dict(sorted(found.items()))


ATTACKS = _found()

__all__ = ["ATTACKS", "Attack", "Knowledge", "poison"]
