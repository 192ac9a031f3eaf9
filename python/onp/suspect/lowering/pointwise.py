"""Functions of each number: activations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

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


def _named(walk: Walk, node: fx.Node, *_: Any, kind: str) -> None:
    walk.emit_like(kind, node)


def _gelu(walk: Walk, node: fx.Node) -> None:
    walk.emit_like("gelu", node, {"approximate": argument_of(node, 1, "approximate", "none")})


def _gelu_module(walk: Walk, node: fx.Node, _: str, module: nn.GELU) -> None:
    walk.emit_like("gelu", node, {"approximate": module.approximate})


def _other(walk: Walk, node: fx.Node) -> None:
    target = node.target
    arguments, named = other_arguments(node)
    if node.all_input_nodes != [source_of(node)]:
        refuse(node, "a function of several values is not handled")

    def function(x: Tensor) -> Any:
        return run_on(target, x, arguments, named)

    walk.emit_like("pointwise", node, {"function": function})


def _other_module(walk: Walk, node: fx.Node, _: str, module: nn.Module) -> None:
    walk.emit_like("pointwise", node, {"function": module})


_KINDS: dict[str, tuple[list[type[nn.Module]], list[Any]]] = {
    "relu": ([nn.ReLU], [F.relu, torch.relu, torch.relu_, "relu", "relu_"]),
    "relu6": ([nn.ReLU6], [F.relu6]),
    "silu": ([nn.SiLU], [F.silu]),
    "sigmoid": ([nn.Sigmoid], [torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"]),
    "hardsigmoid": ([nn.Hardsigmoid], [F.hardsigmoid]),
    "hardswish": ([nn.Hardswish], [F.hardswish]),
}
_OTHER_MODULES: list[type[nn.Module]] = [
    nn.CELU, nn.ELU, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.SELU, nn.Softplus,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
]  # fmt: skip
_OTHER_FUNCTIONS: list[Any] = [
    F.celu, F.elu, F.hardtanh, F.leaky_relu, F.logsigmoid, F.mish, F.selu, F.softplus, F.softsign,
    torch.clamp, torch.tanh, "clamp", "tanh",
]  # fmt: skip

MODULES: dict[type[nn.Module], ModuleHandler] = {
    **{one: partial(_named, kind=kind) for kind, (own, _) in _KINDS.items() for one in own},
    **dict.fromkeys(_OTHER_MODULES, _other_module),
    nn.GELU: _gelu_module,
}
FUNCTIONS: dict[Any, FunctionHandler] = {
    **{one: partial(_named, kind=kind) for kind, (_, own) in _KINDS.items() for one in own},
    **dict.fromkeys(_OTHER_FUNCTIONS, _other),
    **dict.fromkeys((F.gelu, torch._C._nn.gelu), _gelu),
}
