"""Sums, differences, products and quotients of values, and of values and constants."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from onp.suspect import movement
from onp.suspect.movement import Scores, View
from onp.suspect.operations import tensor_of

from .walk import FunctionHandler, ModuleHandler, Walk, refuse


def _arithmetic(walk: Walk, node: fx.Node, how: str) -> None:
    if len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
        refuse(node, f"{how} with keywords is not handled")
    left, right = node.args
    scaled = _scaled(walk, how, left, right)
    if scaled is not None:
        walk.views[node] = scaled
    elif walk.is_value(left) and walk.is_value(right):
        _of_two(walk, node, how, left, right)
    else:
        _with_constant(walk, node, how, left, right)


def _of_two(walk: Walk, node: fx.Node, how: str, left: Any, right: Any) -> None:
    if how == "div":
        refuse(node, "div of two image values is not handled yet")
    (one, last), (other, other_last) = walk.read(node, left), walk.read(node, right)
    shape, other_shape = walk.op_shapes[one], walk.op_shapes[other]
    if how == "mul" and math.prod(shape) < math.prod(other_shape):
        one, other, shape, other_shape = other, one, other_shape, shape
    factors = (*shape[:1], *(1 for _ in shape[1:]))  # one number a channel
    fits = other_shape == shape or (how == "mul" and other_shape == factors)
    if not fits or (last != other_last and len(shape) > 1):
        refuse(node, f"{how} must be of two values of one shape, got {shape}, {other_shape}")
    if how == "sub":  # one and the other's negative
        attrs = {"scale": -torch.ones(shape[0]), "shift": torch.zeros(shape[0])}
        other = walk.emit("affine", node, (other,), shape, last, attrs=attrs)
    walk.emit("product" if how == "mul" else "add", node, (one, other), shape, last)


def _scaled(walk: Walk, how: str, left: Any, right: Any) -> View | Scores | None:
    """What a number makes of an attention's scores, or of its queries or keys; else None."""
    if how == "mul" and isinstance(left, int | float):
        left, right = right, left
    held = walk.views.get(left) if isinstance(left, fx.Node) else None
    if how not in ("mul", "div") or not isinstance(right, int | float) or right == 0:
        return None
    factor = right if how == "mul" else 1 / right
    if isinstance(held, Scores) and not held.softmaxed:
        return replace(held, scale=held.scale * factor)
    apart = isinstance(held, View) and held.moved is not None and movement.layout(held) is None
    if apart and isinstance(held, View) and isinstance(held.source, int):
        return replace(held, factor=held.factor * factor)
    return None


def _with_constant(walk: Walk, node: fx.Node, how: str, left: Any, right: Any) -> None:
    """x + a, x - a, x * a, x / a with a number or a tensor of the model."""
    if not walk.is_value(left):
        if how not in ("add", "mul"):
            refuse(node, f"a constant {how} a value is not handled")
        left, right = right, left
    value, last = walk.read(node, left)
    shape = walk.op_shapes[value]
    if isinstance(right, int | float):
        constant = torch.full(shape[:1], float(right))
    else:
        view = walk.view(node, right)
        index = movement.constant_layout(view, (movement.IMAGES, *walk.shapes[node]), last)
        if index is None or walk.by_channel(node, last) != shape:
            refuse(node, "a constant must hold one number per channel or position")
        tensor = tensor_of(walk.model, str(view.source))
        if index.ndim > 1 or isinstance(tensor, nn.Parameter):
            attrs = {"how": how, "name": view.source, "index": index}
            walk.emit("parameter", node, (value,), shape, last, attrs=attrs)
            return
        constant = tensor.detach().float().cpu().flatten()[index]
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    scale, shift = {
        "mul": (constant, zero),
        "div": (1 / constant, zero),
        "add": (one, constant),
        "sub": (one, -constant),
    }[how]
    walk.emit("affine", node, (value,), shape, last, attrs={"scale": scale, "shift": shift})


_TARGETS: dict[str, list[Any]] = {
    "add": [operator.add, operator.iadd, torch.add, "add", "add_"],
    "sub": [operator.sub, operator.isub, torch.sub, "sub", "sub_"],
    "mul": [operator.mul, operator.imul, torch.mul, "mul", "mul_"],
    "div": [operator.truediv, operator.itruediv, torch.div, "div", "div_"],
}

MODULES: dict[type[nn.Module], ModuleHandler] = {}
FUNCTIONS: dict[Any, FunctionHandler] = {
    target: partial(_arithmetic, how=how) for how, own in _TARGETS.items() for target in own
}
