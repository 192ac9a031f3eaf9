"""What only moves numbers around, or does nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onp.suspect import movement
from onp.suspect.movement import View

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


def _move_module(walk: Walk, node: fx.Node, _: str, module: nn.Module) -> None:
    _moved(walk, node, module)


def _move(walk: Walk, node: fx.Node) -> None:
    """A reshape or the like; it becomes an operation where its result is read."""
    target, source = node.target, source_of(node)
    parts = walk.views.get(source)
    if isinstance(parts, tuple):
        part = node.args[1] if target is operator.getitem else None
        if not isinstance(part, int):
            refuse(node, "parts of a split value must be read one by one")
        walk.views[node] = parts[part]
        return
    arguments, named = other_arguments(node)
    if isinstance(target, str) and target.endswith("_as"):  # as large as another
        target = target.removesuffix("_as")
        arguments = [(movement.IMAGES, *walk.shapes[one]) for one in node.all_input_nodes[1:]]
        named = {}
    elif any(one is not source for one in node.all_input_nodes):
        refuse(node, "a tensor that says how to move a value is not handled")
    _moved(walk, node, lambda places: run_on(target, places, arguments, named))


def _moved(walk: Walk, node: fx.Node, move: Callable[[Tensor], Any]) -> None:
    view = walk.view(node, source_of(node))
    walk.views[node] = moved = view.after(move)
    if isinstance(view.source, int) and view.moved is None and not _fits_fewer(view, moved, move):
        walk.counted.add(view.source)


def _fits_fewer(view: View, whole: View | tuple[View, ...], move: Callable[[Tensor], Any]) -> bool:
    """Whether a move, which made ``whole`` of a value, does the same with a channel less."""
    channels, *space = view.shape
    if channels == 1:
        return True
    fewer = replace(view, shape=(channels - 1, *space))
    try:
        less = fewer.after(move)
    except (RuntimeError, IndexError, ValueError):
        return False
    pairs = zip(_parts(whole), _parts(less), strict=False)
    return len(_parts(whole)) == len(_parts(less)) and all(_alike(*pair) for pair in pairs)


def _parts(views: View | tuple[View, ...]) -> tuple[View, ...]:
    return views if isinstance(views, tuple) else (views,)


def _alike(whole: View, less: View) -> bool:
    """All channels of one, and all of the other, in their order and of the same positions."""
    one, other = movement.layout(whole), movement.layout(less)
    return (
        one is not None
        and other is not None
        and one.flat == other.flat
        and len(one.channels) == whole.shape[0]
        and len(other.channels) == less.shape[0]
        and movement.in_order(one.channels)
        and movement.in_order(other.channels)
        and torch.equal(one.positions, other.positions)
    )


MODULES: dict[type[nn.Module], ModuleHandler] = {
    nn.Flatten: _move_module,
    nn.Unflatten: _move_module,
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
