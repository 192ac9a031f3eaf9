"""Code that the user names on the command line: imported only when they vouch for it."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from onp.errors import UsageError

_SPEC = re.compile(
    r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)(?P<call>\(.*\))?",
    re.ASCII,
)


def is_code_spec(text: str) -> bool:
    """Whether ``text`` reads ``package.module:name`` or ``package.module:name(arguments)``."""
    return _SPEC.fullmatch(text) is not None


def import_callable(spec: str, option: str, trust: bool) -> Callable[..., Any]:
    """Import ``package.module:name``; the working directory is searched first. Arguments, as in
    ``torchvision.models:efficientnet_b3(num_classes=10)``, are numbers, strings and the like; they
    are bound to what is returned.

    Importing runs the module's code, so UsageError is raised without ``trust``, and also where
    nothing callable is found. ``option`` is the command-line option that errors name.
    """
    parts = _SPEC.fullmatch(spec)
    if parts is None:
        raise UsageError(f"{option} must be package.module:name, got {spec!r}")
    if not trust:
        raise UsageError(f"{option} {spec} runs that module's code; add --trust if you trust it")
    module_name, name = parts["module"], parts["name"]
    positional, named = _arguments(spec, option, parts["call"] or "()")
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
    return partial(found, *positional, **named) if parts["call"] else found


def _arguments(spec: str, option: str, call: str) -> tuple[list[Any], dict[str, Any]]:
    """What stands in the parentheses. Nothing there is run."""
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        named = {one.arg: ast.literal_eval(one.value) for one in node.keywords}
        if None in named or len(named) < len(node.keywords):
            raise ValueError
        return [ast.literal_eval(one) for one in node.args], named  # type: ignore[return-value]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{option} {spec}: arguments must be numbers, strings, True, False, None, or lists or "
            "tuples of them"
        ) from error
