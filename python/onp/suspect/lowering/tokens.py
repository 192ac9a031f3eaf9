"""What works on features, tokens or pixels: linear layers, means, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from onp.suspect import movement

from .walk import FunctionHandler, ModuleHandler, Walk, argument_of, refuse, source_of
from .weights import owner_of


def _linear(walk: Walk, node: fx.Node, name: str, *_: Any) -> None:
    value, last = walk.read_last(node, source_of(node))
    walk.emit("linear", node, (value,), walk.by_channel(node, last), last, name)


def _linear_function(walk: Walk, node: fx.Node) -> None:
    """F.linear; its tensors must be those of an nn.Linear."""
    owned = owner_of(walk, node, {"weight": 1, "bias": 2}, nn.Linear)
    assert owned is not None  # it has a weight
    _linear(walk, node, owned[0])


def _mean(walk: Walk, node: fx.Node) -> None:
    value, last = walk.read(node, source_of(node))
    channels, *space = walk.op_shapes[value]
    count = len(space) + 2
    dims = argument_of(node, 1, "dim", node.kwargs.get("axis", 0))
    axes = {d % count for d in (dims if isinstance(dims, list | tuple) else [dims])}
    if not space or axes != set(range(1, count)) - {count - 1 if last else 1}:
        refuse(node, "only the mean over all positions is handled")
    pooled = walk.emit("globalpool", node, (value,), (channels, *(1,) * len(space)), last)
    if not argument_of(node, 2, "keepdim", node.kwargs.get("keepdims", False)):
        walk.emit("flatten", node, (pooled,), (channels,))


def _concat(walk: Walk, node: fx.Node) -> None:
    parts = argument_of(node, 0, "tensors")
    if not isinstance(parts, list | tuple):
        refuse(node, "must list its tensors one by one")
    count = len(walk.shapes[node]) + 1
    dim = argument_of(node, 1, "dim", 0) % count
    images = [walk.read(node, part) for part in parts if walk.is_value(part)]
    if not images or len({last for _, last in images}) > 1:
        refuse(node, "concatenated values must have their channels in one place")
    last = images[0][1]
    if dim == (count - 1 if last else 1) and len(images) == len(parts):
        values = tuple(value for value, _ in images)
        walk.emit("concat", node, values, walk.by_channel(node, last), last)
    elif count == 3 and dim == (1 if last else 2) and len(images) == 1:
        _extend(walk, node, parts, *images[0])
    else:
        refuse(node, "only channels, or one value's tokens and constants, are concatenated")


def _extend(walk: Walk, node: fx.Node, parts: Sequence[Any], value: int, last: bool) -> None:
    """Concatenate tokens of the model's own before and behind those of a value."""
    place = next(i for i, part in enumerate(parts) if walk.is_value(part))
    for number in (*range(place - 1, -1, -1), *range(place + 1, len(parts))):
        part = parts[number]
        view = walk.view(node, part)
        shape = (movement.IMAGES, *walk.shapes[part])
        index = movement.constant_layout(view, shape, last)
        if index is None:
            refuse(node, f"{part} must be the same for every image")
        channels, count = walk.op_shapes[value]
        index = index.view(channels, -1).expand(-1, walk.by_channel(part, last)[1])
        attrs = {"name": view.source, "index": index, "front": number < place}
        shape = (channels, count + index.shape[1])
        value = walk.emit("extend", node, (value,), shape, last, attrs=attrs)


MODULES: dict[type[nn.Module], ModuleHandler] = {nn.Linear: _linear}
FUNCTIONS: dict[Any, FunctionHandler] = {
    F.linear: _linear_function,
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.cat, torch.concat), _concat),
}
