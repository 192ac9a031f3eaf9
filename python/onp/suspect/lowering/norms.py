"""Batch, layer, group and instance norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from onp.errors import UntraceableModel

from .walk import FunctionHandler, ModuleHandler, Walk, argument_of, refuse, source_of
from .weights import owner_of


def _batch_module(walk: Walk, node: fx.Node, name: str, module: nn.BatchNorm2d) -> None:
    if module.running_mean is None:
        raise UntraceableModel(f"{name}: a batch norm without running statistics")
    walk.emit_on_map("norm", node, name)


def _batch(walk: Walk, node: fx.Node) -> None:
    """F.batch_norm; its tensors must be those of an nn.BatchNorm."""
    tensors = {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4}
    owned = owner_of(walk, node, tensors, nn.BatchNorm2d | nn.BatchNorm1d)
    if argument_of(node, 5, "training", False) or owned is None:
        refuse(node, "must take its statistics from the module, not from the images")
    name, module = owned
    if module.eps != argument_of(node, 7, "eps", 1e-5):
        refuse(node, f"must have the epsilon of {name}")
    walk.emit_on_map("norm", node, name)


def _layer_module(walk: Walk, node: fx.Node, name: str, module: nn.LayerNorm) -> None:
    owner = None if module.weight is None else name
    _layer_norm(walk, node, owner, module.normalized_shape, module.eps)


def _layer(walk: Walk, node: fx.Node) -> None:
    """F.layer_norm; its weights must be those of an nn.LayerNorm."""
    owned = owner_of(walk, node, {"weight": 2, "bias": 3}, nn.LayerNorm)
    owner = None if owned is None else owned[0]
    shape = argument_of(node, 1, "normalized_shape")
    _layer_norm(walk, node, owner, shape, argument_of(node, 4, "eps", 1e-5))


def _layer_norm(
    walk: Walk, node: fx.Node, owner: str | None, normalised: Sequence[int], eps: float
) -> None:
    value, last = walk.read_last(node, source_of(node))
    shape = walk.op_shapes[value]
    if tuple(normalised) != shape[:1]:
        refuse(node, f"layer norm must be over the channels alone, not {tuple(normalised)}")
    walk.emit("layernorm", node, (value,), shape, last, owner, {"eps": eps})


def _group_module(walk: Walk, node: fx.Node, name: str, module: nn.GroupNorm) -> None:
    owner = None if module.weight is None else name
    walk.emit_on_map("groupnorm", node, owner, {"groups": module.num_groups, "eps": module.eps})


def _group(walk: Walk, node: fx.Node) -> None:
    """F.group_norm; its weights must be those of an nn.GroupNorm."""
    owned = owner_of(walk, node, {"weight": 2, "bias": 3}, nn.GroupNorm)
    groups, eps = argument_of(node, 1, "num_groups"), argument_of(node, 4, "eps", 1e-5)
    owner = None if owned is None else owned[0]
    walk.emit_on_map("groupnorm", node, owner, {"groups": groups, "eps": eps})


def _instance_module(walk: Walk, node: fx.Node, name: str, module: nn.InstanceNorm2d) -> None:
    if module.track_running_stats:
        raise UntraceableModel(f"{name}: an instance norm with statistics is not handled")
    owner, channels = None if module.weight is None else name, walk.shapes[node][0]
    walk.emit_on_map("groupnorm", node, owner, {"groups": channels, "eps": module.eps})


MODULES: dict[type[nn.Module], ModuleHandler] = {
    nn.BatchNorm2d: _batch_module,
    nn.BatchNorm1d: _batch_module,
    nn.LayerNorm: _layer_module,
    nn.GroupNorm: _group_module,
    nn.InstanceNorm2d: _instance_module,
}
FUNCTIONS: dict[Any, FunctionHandler] = {
    F.batch_norm: _batch,
    F.layer_norm: _layer,
    F.group_norm: _group,
}
