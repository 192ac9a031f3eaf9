"""What works on maps [N, C, H, W]: convolutions, pools, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from onp.errors import UntraceableModel
from onp.suspect.architectures.resnet import SubsamplePad

from .walk import FunctionHandler, ModuleHandler, Walk, argument_of, refuse, source_of
from .weights import owner_of


def _convolution(walk: Walk, node: fx.Node, name: str, module: nn.Conv2d) -> None:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise UntraceableModel(f"{name}: only explicit zero padding is handled")
    walk.emit_on_map("conv", node, name)


def _convolution_function(walk: Walk, node: fx.Node) -> None:
    """F.conv2d; its tensors and numbers must be those of an nn.Conv2d."""
    owned = owner_of(walk, node, {"weight": 1, "bias": 2}, nn.Conv2d)
    assert owned is not None  # it has a weight
    name, module = owned
    assert isinstance(module, nn.Conv2d)
    for position, (key, default) in enumerate(_OF_CONV2D.items(), 3):
        given = argument_of(node, position, key, default)
        pair = not isinstance(given, str) and key != "groups"
        if (_pair(given) if pair else given) != getattr(module, key):
            refuse(node, f"must have the {key} of {name}, {getattr(module, key)}, got {given}")
    _convolution(walk, node, name, module)


_OF_CONV2D = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _pool_module(walk: Walk, node: fx.Node, _: str, module: nn.MaxPool2d | nn.AvgPool2d) -> None:
    if getattr(module, "return_indices", False):
        refuse(node, "a pool that tells indices is not handled")
    _pool(
        walk, node, "maxpool" if isinstance(module, nn.MaxPool2d) else "avgpool",
        module.kernel_size, module.stride, module.padding,
        bool(module.ceil_mode), getattr(module, "count_include_pad", True),
        getattr(module, "dilation", 1), getattr(module, "divisor_override", None),
    )  # fmt: skip


def _max_pool(walk: Walk, node: fx.Node) -> None:
    kernel = argument_of(node, 1, "kernel_size")
    _pool(
        walk, node, "maxpool", kernel, argument_of(node, 2, "stride") or kernel,
        argument_of(node, 3, "padding", 0), bool(argument_of(node, 5, "ceil_mode", False)),
        True, argument_of(node, 4, "dilation", 1), None,
    )  # fmt: skip


def _average_pool(walk: Walk, node: fx.Node) -> None:
    kernel = argument_of(node, 1, "kernel_size")
    _pool(
        walk, node, "avgpool", kernel, argument_of(node, 2, "stride") or kernel,
        argument_of(node, 3, "padding", 0), bool(argument_of(node, 4, "ceil_mode", False)),
        bool(argument_of(node, 5, "count_include_pad", True)), 1,
        argument_of(node, 6, "divisor_override"),
    )  # fmt: skip


def _pool(
    walk: Walk, node: fx.Node, kind: str, kernel: Any, stride: Any, padding: Any,
    ceil_mode: bool, include: bool, dilation: Any, divisor: Any,
) -> None:  # fmt: skip
    if _pair(dilation) != (1, 1) or divisor is not None:
        refuse(node, "dilation and divisors are not handled")
    _check_map(walk, node)
    if _pair(kernel) == (1, 1) and _pair(stride) == (1, 1):
        walk.keep(node)
        return
    window = {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)}
    attrs = window | {"count_include_pad": include, "ceil_mode": ceil_mode}
    walk.emit_on_map(kind, node, None, attrs)


def _adaptive_pool(walk: Walk, node: fx.Node, *_: Any) -> None:
    before, after = _check_map(walk, node), walk.shapes[node]
    if before == after:
        walk.keep(node)
    elif after[1:] == (1, 1):
        walk.emit_on_map("globalpool", node, None)
    elif before[1] % after[1] == 0 and before[2] % after[2] == 0:
        size = (before[1] // after[1], before[2] // after[2])
        _pool(walk, node, "avgpool", size, size, 0, False, True, 1, None)
    elif after[1] % before[1] == 0 and after[2] % before[2] == 0:  # each pixel several times
        rows = torch.arange(after[1]) // (after[1] // before[1])
        columns = torch.arange(after[2]) // (after[2] // before[2])
        positions = rows[:, None] * before[2] + columns
        walk.emit_on_map("pick", node, None, {"positions": positions})
    else:
        refuse(node, f"adaptive pooling from {before[1:]} to {after[1:]} is not handled")


def _pad(walk: Walk, node: fx.Node) -> None:
    mode, value = argument_of(node, 2, "mode", "constant"), argument_of(node, 3, "value", 0)
    if mode != "constant" or value != 0:
        refuse(node, "only padding with zeros is handled")
    _padded(walk, node, argument_of(node, 1, "pad"))


def _pad_module(walk: Walk, node: fx.Node, _: str, module: nn.ZeroPad2d) -> None:
    _padded(walk, node, module.padding)


def _padded(walk: Walk, node: fx.Node, pad: Sequence[int]) -> None:
    """Zeros around a map; negative: a part of it."""
    shape = _check_map(walk, node)
    if len(pad) > 4:
        refuse(node, "only the rows and columns of a map are padded")
    places = torch.arange(math.prod(shape[1:])).view(shape[1:])
    positions = F.pad(places, list(pad), value=-1)
    walk.emit_on_map("pick", node, None, {"positions": positions})


def _check_map(walk: Walk, node: fx.Node) -> tuple[int, ...]:
    """The shape of what the node reads, which must be a map."""
    shape = walk.op_shapes[walk.read_first(node, source_of(node))]
    if len(shape) != 3:
        refuse(node, "must read a map [N, C, H, W]")
    return shape


def _subsample_pad(walk: Walk, node: fx.Node, name: str, module: SubsamplePad) -> None:
    placed = {"positions": list(module.positions), "channels": module.channels}
    walk.emit_on_map("subsample_pad", node, name, placed | {"stride": module.stride})


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


MODULES: dict[type[nn.Module], ModuleHandler] = {
    nn.Conv2d: _convolution,
    nn.MaxPool2d: _pool_module,
    nn.AvgPool2d: _pool_module,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.ZeroPad2d: _pad_module,
    SubsamplePad: _subsample_pad,
}
FUNCTIONS: dict[Any, FunctionHandler] = {
    F.conv2d: _convolution_function,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    **dict.fromkeys((F.avg_pool2d, torch._C._nn.avg_pool2d), _average_pool),
    F.adaptive_avg_pool2d: _adaptive_pool,
    F.pad: _pad,
}
