"""The defences of the scoreboard by name; all have the form of ``bench.defences.api.Defence``.

A defence is added by a file in this folder alone: what is marked ``@defence("<name>")`` is found.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from bench.defences.api import REGISTERED, Defence

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

DEFENCES: dict[str, Defence] = dict(sorted(REGISTERED.items()))
