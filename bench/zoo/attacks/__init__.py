"""Backdoor attacks from their papers: one class each, with one place for its formula.

An attack is added by a file in this folder alone: every ``Attack`` with a name is found.
"""

from __future__ import annotations

from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules

from bench.zoo.attacks.base import Attack, Knowledge, poison


def _found() -> dict[str, type[Attack]]:
    """The attacks of the modules in this folder, by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    classes = [value for module in modules for value in vars(module).values()]
    attacks = [
        value
        for value in classes
        if isinstance(value, type) and issubclass(value, Attack) and not isabstract(value)
    ]
    return {attack.name: attack for attack in sorted(attacks, key=lambda attack: attack.name)}


ATTACKS = _found()

__all__ = ["ATTACKS", "Attack", "Knowledge", "poison"]
