"""Softmax attention: torch's function and module, or spelled out as products of matrices."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from onp.suspect import movement
from onp.suspect.movement import Scores, View

from .walk import FunctionHandler, ModuleHandler, Walk, argument_of, refuse, source_of


def _function(walk: Walk, node: fx.Node) -> None:
    options = ((3, "attn_mask"), (4, "dropout_p"), (5, "is_causal"), (7, "enable_gqa"))
    for position, name in options:
        if argument_of(node, position, name):
            refuse(node, f"attention with {name} is not handled")
    scale = argument_of(node, 6, "scale")
    if isinstance(scale, fx.Node):
        refuse(node, "attention's scale must be a number")
    names = ("query", "key", "value")
    query, key, value = (walk.view(node, argument_of(node, *at)) for at in enumerate(names))
    scale = query.places().shape[-1] ** -0.5 if scale is None else scale
    _attend(walk, node, query, key, value, scale * query.factor * key.factor)


def _matmul(walk: Walk, node: fx.Node) -> None:
    """Queries times keys, or what a softmax made of them times values."""
    if len(node.args) != 2 or node.kwargs:
        refuse(node, "a product of matrices with keywords is not handled")
    left, right = node.args
    weights = walk.views.get(left) if isinstance(left, fx.Node) else None
    if isinstance(weights, Scores):
        if not weights.softmaxed:
            refuse(node, "an attention's scores must go through a softmax")
        value = walk.view(node, right)
        _attend(walk, node, weights.query, weights.key, value, weights.scale)
        return
    found = movement.scores(walk.view(node, left), walk.view(node, right))
    if found is None:
        refuse(node, "only products of an attention's queries and keys are handled")
    walk.views[node] = found


def _softmax(walk: Walk, node: fx.Node) -> None:
    _softmax_over(walk, node, argument_of(node, 1, "dim"))


def _softmax_module(walk: Walk, node: fx.Node, _: str, module: nn.Softmax) -> None:
    _softmax_over(walk, node, module.dim)


def _softmax_over(walk: Walk, node: fx.Node, dim: int | None) -> None:
    held = walk.views.get(source_of(node))
    if not isinstance(held, Scores) or dim not in (-1, len(walk.shapes[node])):
        refuse(node, "a softmax must be of an attention's scores, over the keys")
    walk.views[node] = replace(held, softmaxed=True)


def _attend(walk: Walk, node: fx.Node, query: View, key: View, value: View, scale: float) -> None:
    attrs: dict[str, Any] = {"scale": scale}
    inputs = []
    for letter, view in (("q", query), ("k", key), ("v", value)):
        channels = movement.head_channels(view)
        if channels is None or not isinstance(view.source, int):
            refuse(
                node,
                "attention must read queries, keys and values as [N, heads, tokens, channels]",
            )
        attrs[letter] = channels
        inputs.append(view.source)
    if value.factor != 1:
        refuse(node, "attention must not scale its values")
    if len({len(attrs[letter]) for letter in "qkv"}) > 1:
        refuse(node, "attention must have as many heads of keys and values as of queries")
    heads, width = attrs["v"].shape
    count = walk.shapes[node][-2]
    walk.emit("attention", node, tuple(inputs), (heads * width, count), attrs=attrs)
    split = (movement.IMAGES, *((heads,) if len(walk.shapes[node]) == 3 else ()), width, count)
    view = walk.view(node, node)
    walk.views[node] = view.after(lambda places: places.view(split).transpose(-1, -2))


def _module(walk: Walk, node: fx.Node, name: str, module: nn.MultiheadAttention) -> None:
    """Of one value with itself: a linear layer, attention and another linear layer."""
    names = ("query", "key", "value")
    query, *others = (walk.view(node, argument_of(node, *at)) for at in enumerate(names))
    alone = all(
        one.source == query.source and torch.equal(one.places(), query.places()) for one in others
    )
    masks = (argument_of(node, 3, "key_padding_mask"), argument_of(node, 5, "attn_mask"))
    plain = module.in_proj_weight is not None and module.bias_k is None
    if not alone or masks != (None, None) or not plain or module.add_zero_attn:
        refuse(node, "attention must be of one value with itself, without masks or added keys")
    value, last = walk.read_last(node, argument_of(node, 0, "query"))
    if not module.batch_first or len(walk.op_shapes[value]) != 2:
        refuse(node, "attention must have batch_first=True and read [N, tokens, features]")
    channels, count = shape = walk.op_shapes[value]
    made = walk.emit("linear", node, (value,), (3 * channels, count), last, name)
    split = torch.arange(3 * channels).view(3, module.num_heads, module.head_dim)
    heads = dict(zip("qkv", split, strict=True))
    attended = walk.emit("attention", node, (made,) * 3, shape, attrs=heads | {"scale": None})
    walk.emit("linear", node, (attended,), shape, True, f"{name}.out_proj")
    walk.views[node] = (walk.view(node, node), None)  # the weights


MODULES: dict[type[nn.Module], ModuleHandler] = {
    nn.MultiheadAttention: _module,
    nn.Softmax: _softmax_module,
}
FUNCTIONS: dict[Any, FunctionHandler] = {
    F.scaled_dot_product_attention: _function,
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _matmul),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _softmax),
}
