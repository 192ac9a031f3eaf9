"""What only moves numbers around, or does nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from onp.suspect import movement

from .walk import (
    FunctionHandler,
    ModuleHandler,
    Walk,
    argument_of,
    other_arguments,
    refuse,
    run_on,
    source_of,
)


def _keep(walk: Walk, node: fx.Node, *_: Any) -> None:
    walk.keep(node)


def _dropout(walk: Walk, node: fx.Node) -> None:
    if argument_of(node, 2, "training", True) is not False:
        refuse(node, "F.dropout stays on; pass training=False")
    walk.keep(node)


def _flatten(walk: Walk, node: fx.Node, _: str, module: nn.Module) -> None:
    walk.views[node] = walk.view(node, source_of(node)).after(module)


def _move(walk: Walk, node: fx.Node) -> None:
    """A reshape or the like; it becomes an operation where its result is read."""
    target, source = node.target, source_of(node)
    parts = walk.views.get(source)
    if isinstance(parts, tuple):
        part = node.args[1] if target is operator.getitem else None
        if not isinstance(part, int):
            refuse(node, "parts of a split value must be read one by one")
        if not -len(parts) <= part < len(parts):
            refuse(node, f"part {part} of {source} is not handled")
        walk.views[node] = parts[part]
        return
    arguments, named = other_arguments(node)
    if isinstance(target, str) and target.endswith("_as"):  # as large as another
        target = target.removesuffix("_as")
        arguments = [(movement.IMAGES, *walk.shapes[one]) for one in node.all_input_nodes[1:]]
        named = {}
    elif any(one is not source for one in node.all_input_nodes):
        refuse(node, "a tensor that says how to move a value is not handled")
    view = walk.view(node, source)
    walk.views[node] = view.after(lambda places: run_on(target, places, arguments, named))


MODULES: dict[type[nn.Module], ModuleHandler] = {
    nn.Flatten: _flatten,
    nn.Unflatten: _flatten,
    nn.Identity: _keep,
    nn.Dropout: _keep,
    nn.Dropout2d: _keep,
}
FUNCTIONS: dict[Any, FunctionHandler] = {
    **dict.fromkeys(movement.FUNCTIONS | movement.METHODS, _move),
    "contiguous": _keep,
    "float": _keep,
    F.dropout: _dropout,
}
