"""Code that the user names on the command line: imported only when they vouch for it."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onp.errors import UsageError

_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_code_spec(text: str) -> bool:
    """Whether ``text`` reads ``package.module:name``."""
    return _SPEC.fullmatch(text) is not None


def import_callable(spec: str, option: str, trust: bool) -> Callable[..., Any]:
    """Import ``package.module:name``; the working directory is searched first.

    Importing runs the module's code, so UsageError is raised without ``trust``, and also where
    nothing callable is found. ``option`` is the command-line option that errors name.
    """
    if not is_code_spec(spec):
        raise UsageError(f"{option} must be package.module:name, got {spec!r}")
    if not trust:
        raise UsageError(f"{option} {spec} runs that module's code; add --trust if you trust it")
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:
        raise UsageError(
            f"{option} {spec}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UsageError(f"{option} {spec}: {module_name} has no callable {name}")
    return found
