"""From a module to operations: every node that ``torch.fx`` recorded becomes an ``Op``, or part of
one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onp.errors import UntraceableModel
from onp.suspect import movement
from onp.suspect.architectures.resnet import SubsamplePad
from onp.suspect.movement import Scores, View
from onp.suspect.operations import Op, tensor_of
from onp.suspect.recording import Recording, record


@dataclass(frozen=True)
class Program:
    """A network as operations."""

    ops: tuple[Op, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Output shape of each op without the images: (C, H, W), (C, T) or (F,)."""


def lower(model: nn.Module, image_shape: tuple[int, int, int]) -> Program:
    """The operations of ``model`` (eval mode) on images of ``image_shape`` (C, H, W).

    Raises UntraceableModel, naming the module or function that cannot be handled.
    """
    lowering = _Lowering(record(model, image_shape))
    lowering.run()
    _refuse_shared_weights(lowering.ops)
    return Program(tuple(lowering.ops), tuple(lowering.op_shapes))


_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu", torch.relu_: "relu",
    F.relu6: "relu6", F.gelu: "gelu", torch._C._nn.gelu: "gelu", F.silu: "silu",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
    F.hardsigmoid: "hardsigmoid", F.hardswish: "hardswish",
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add", "add_": "add",
    F.avg_pool2d: "avgpool", torch._C._nn.avg_pool2d: "avgpool",
    F.max_pool2d: "maxpool", torch.max_pool2d: "maxpool",
    F.adaptive_avg_pool2d: "adaptive_pool", "mean": "mean", torch.mean: "mean",
    F.dropout: "dropout", "contiguous": "identity", "float": "identity",
    operator.sub: "sub", torch.sub: "sub", "sub": "sub",
    operator.truediv: "div", torch.div: "div", "div": "div",
    operator.mul: "mul", torch.mul: "mul", "mul": "mul", "mul_": "mul",
    torch.cat: "concat", torch.concat: "concat", F.layer_norm: "layer_norm",
    F.batch_norm: "batch_norm", F.group_norm: "group_norm", F.linear: "function_linear",
    F.pad: "pad",
    F.scaled_dot_product_attention: "attention", F.softmax: "softmax", torch.softmax: "softmax",
    "softmax": "softmax", torch.matmul: "matmul", operator.matmul: "matmul", "matmul": "matmul",
    torch.bmm: "matmul", "bmm": "matmul",
}  # fmt: skip
_ELEMENTWISE = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid", nn.Hardswish: "hardswish",
}  # fmt: skip
_POINTWISE = (
    nn.CELU, nn.ELU, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.SELU, nn.Softplus,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
    F.celu, F.elu, F.hardtanh, F.leaky_relu, F.logsigmoid, F.mish, F.selu, F.softplus, F.softsign,
    torch.clamp, torch.tanh, "clamp", "tanh",
)  # fmt: skip
_ARITHMETIC = ("add", "sub", "mul", "div")


class _Lowering:
    """Walks the fx graph once and writes the ops."""

    def __init__(self, recording: Recording) -> None:
        self.model = recording.model
        self.graph = recording.graph
        self.shapes = recording.shapes
        self.unchanged = recording.unchanged
        self.ops: list[Op] = []
        self.op_shapes: list[tuple[int, ...]] = []
        self.views: dict[fx.Node, View | Scores | tuple[View, ...]] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            getattr(self, f"_{node.op}")(node)

    # ---- values

    def _emit(
        self,
        kind: str,
        node: fx.Node,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        last: bool = False,
        module: str | None = None,
        attrs: dict[str, Any] | None = None,
    ) -> int:
        """Write an op whose value, of ``shape``, is what ``node`` holds from here on."""
        self.ops.append(Op(kind, node.name, inputs, module, attrs or {}))
        self.op_shapes.append(shape)
        self.views[node] = View(len(self.ops) - 1, shape, last)
        return len(self.ops) - 1

    def _view(self, node: fx.Node, argument: Any) -> View:
        view = self.views.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(view, View):
            _refuse(node, f"reads {argument}, which is no image value")
        return view

    def _is_value(self, argument: Any) -> bool:
        view = self.views.get(argument) if isinstance(argument, fx.Node) else None
        return isinstance(view, View) and isinstance(view.source, int)

    def _read(self, node: fx.Node, argument: Any) -> tuple[int, bool]:
        """The op whose value ``argument`` is, and whether the module's code has its channels last.

        Moves that changed the value's shape become operations here.
        """
        view = self._view(node, argument)
        if not isinstance(view.source, int):
            _refuse(node, f"reads {argument}, which is no image value")
        if view.moved is None:
            return view.source, view.last
        found = movement.layout(view) if view.factor == 1 else None
        if found is None:
            _refuse(node, f"reads {argument}, which takes channels apart or mixes them")
        source, shape, positions = view.source, view.shape, found.positions
        if len(found.channels) != shape[0] or not movement.in_order(found.channels):
            shape = (len(found.channels), *shape[1:])
            attrs = {"channels": found.channels}
            source = self._emit("select", argument, (source,), shape, attrs=attrs)
        whole = positions.numel() == math.prod(shape[1:]) and movement.in_order(positions)
        if not whole or (positions.shape != shape[1:] and not found.flat):
            shape, attrs = (shape[0], *positions.shape), {"positions": positions}
            source = self._emit("pick", argument, (source,), shape, found.last, attrs=attrs)
        self.views[argument] = View(source, shape, found.last)
        if found.flat:
            self._emit("flatten", argument, (source,), (math.prod(shape),))
        return self._read(node, argument)

    def _read_first(self, node: fx.Node, argument: Any) -> int:
        """The op of a value whose channels come first in the module's code too."""
        value, last = self._read(node, argument)
        if last and len(self.op_shapes[value]) > 1:
            _refuse(node, "must read its channels first, [N, C, H, W]")
        return value

    def _read_last(self, node: fx.Node, argument: Any) -> tuple[int, bool]:
        """The op of a value whose channels come last: features, tokens or pixels."""
        value, last = self._read(node, argument)
        if not last and len(self.op_shapes[value]) > 1:
            _refuse(node, "must read its channels last, [N, features] or [N, tokens, features]")
        return value, last

    def _by_channel(self, node: fx.Node, last: bool) -> tuple[int, ...]:
        """The shape of the node's tensor with the channels first."""
        shape = self.shapes[node]
        return (shape[-1], *shape[:-1]) if last else shape

    # ---- kinds of nodes

    def _placeholder(self, node: fx.Node) -> None:
        self._emit("input", node, (), self.shapes[node])

    def _output(self, node: fx.Node) -> None:
        logits = node.args[0]
        if not isinstance(logits, fx.Node) or len(self.shapes.get(logits, ())) != 1:
            raise UntraceableModel("the network must return one tensor of logits [N, classes]")
        self._emit("output", node, (self._read_first(node, logits),), self.shapes[logits])

    def _get_attr(self, node: fx.Node) -> None:
        """A tensor of the model; it becomes part of the operation that reads it."""
        name = str(node.target)
        self.views[node] = View(name, tuple(tensor_of(self.model, name).shape))

    def _call_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise UntraceableModel(f"{name}: only explicit zero padding is handled")
            self._on_map("conv", node, name)
        elif isinstance(module, nn.Linear):
            self._linear(node, name)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            if module.running_mean is None:
                raise UntraceableModel(f"{name}: a batch norm without running statistics")
            self._on_map("norm", node, name)
        elif isinstance(module, nn.GroupNorm):
            owner = None if module.weight is None else name
            attrs = {"groups": module.num_groups, "eps": module.eps}
            self._elementwise("groupnorm", node, attrs, owner)
        elif isinstance(module, nn.InstanceNorm2d):
            if module.track_running_stats:
                raise UntraceableModel(f"{name}: an instance norm with statistics is not handled")
            owner = None if module.weight is None else name
            attrs = {"groups": module.num_features, "eps": module.eps}
            self._elementwise("groupnorm", node, attrs, owner)
        elif isinstance(module, nn.ZeroPad2d):
            self._padded(node, module.padding)
        elif isinstance(module, nn.LayerNorm):
            owner = None if module.weight is None else name
            self._normalise(node, owner, module.normalized_shape, module.eps)
        elif type(module) in _ELEMENTWISE:
            self._elementwise(_ELEMENTWISE[type(module)], node)
        elif isinstance(module, nn.MultiheadAttention):
            self._multihead_attention(node, name, module)
        elif type(module) in _POINTWISE:
            self._elementwise("pointwise", node, {"function": module})
        elif isinstance(module, nn.Softmax):
            self._softmax_over(node, module.dim)
        elif isinstance(module, nn.GELU):
            self._elementwise("gelu", node, {"approximate": module.approximate})
        elif isinstance(module, nn.Flatten | nn.Unflatten):
            self.views[node] = self._view(node, _source(node)).after(module)
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            self._identity(node)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            self._pool(
                "maxpool" if isinstance(module, nn.MaxPool2d) else "avgpool", node,
                module.kernel_size, module.stride, module.padding,
                bool(module.ceil_mode), getattr(module, "count_include_pad", True),
                getattr(module, "dilation", 1), getattr(module, "divisor_override", None),
            )  # fmt: skip
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node)
        elif isinstance(module, SubsamplePad):
            placed = {"positions": list(module.positions), "channels": module.channels}
            self._on_map("subsample_pad", node, name, placed | {"stride": module.stride})
        else:
            raise UntraceableModel(
                f"{name}: modules of type {type(module).__name__} are not handled yet"
            )

    def _call_function(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", str(node.target))
        self._call(node, f"the function {name}", node.target in movement.FUNCTIONS)

    def _call_method(self, node: fx.Node) -> None:
        self._call(node, f"the method .{node.target}()", node.target in movement.METHODS)

    def _call(self, node: fx.Node, named: str, moves: bool) -> None:
        kind = "move" if moves else _FUNCTIONS.get(node.target)
        if node.target in _POINTWISE:
            self._pointwise(node)
        elif kind is None and node in self.unchanged:
            self._identity(node)
        elif kind is None:
            _refuse(node, f"{named} is not handled yet")
        elif kind in _ARITHMETIC:
            self._arithmetic(kind, node)
        elif kind in _ELEMENTWISE.values():
            self._elementwise(kind, node)
        else:
            getattr(self, f"_{kind}")(node)

    # ---- moves, and what does nothing

    def _identity(self, node: fx.Node) -> None:
        source = _source(node)
        held = self.views.get(source) if isinstance(source, fx.Node) else None
        self.views[node] = held if isinstance(held, Scores) else self._view(node, source)

    def _dropout(self, node: fx.Node) -> None:
        if _argument(node, 2, "training", True) is not False:
            _refuse(node, "F.dropout stays on; pass training=False")
        self._identity(node)

    def _move(self, node: fx.Node) -> None:
        """A reshape or the like; it becomes an operation where its result is read."""
        target, source = node.target, _source(node)
        parts = self.views.get(source)
        if isinstance(parts, tuple):
            part = node.args[1] if target is operator.getitem else None
            if not isinstance(part, int):
                _refuse(node, "parts of a split value must be read one by one")
            if not -len(parts) <= part < len(parts):
                _refuse(node, f"part {part} of {source} is not handled")
            self.views[node] = parts[part]
            return
        arguments: list[Any] = [a for a in node.args if a is not source]
        keywords = {key: value for key, value in node.kwargs.items() if value is not source}
        if isinstance(target, str) and target.endswith("_as"):  # as large as another
            target = target.removesuffix("_as")
            arguments = [(movement.IMAGES, *self.shapes[one]) for one in arguments]
        elif any(one is not source for one in node.all_input_nodes):
            _refuse(node, "a tensor that says how to move a value is not handled")

        def move(places: Tensor) -> Any:
            run = getattr(Tensor, target) if isinstance(target, str) else target
            return run(places, *arguments, **keywords)

        self.views[node] = self._view(node, source).after(move)

    # ---- channel for channel

    def _elementwise(
        self,
        kind: str,
        node: fx.Node,
        attrs: dict[str, Any] | None = None,
        module: str | None = None,
    ) -> None:
        value, last = self._read(node, _source(node))
        self._emit(kind, node, (value,), self.op_shapes[value], last, module, attrs)

    def _pointwise(self, node: fx.Node) -> None:
        target, arguments, keywords = node.target, node.args[1:], node.kwargs
        if node.all_input_nodes != [_source(node)]:
            _refuse(node, "a function of several values is not handled")

        def function(x: Tensor) -> Any:
            run = getattr(Tensor, target) if isinstance(target, str) else target
            return run(x, *arguments, **keywords)

        self._elementwise("pointwise", node, {"function": function})

    def _gelu(self, node: fx.Node) -> None:
        approximate = _argument(node, 1, "approximate", "none")
        self._elementwise("gelu", node, {"approximate": approximate})

    def _arithmetic(self, kind: str, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
            _refuse(node, f"{kind} with keywords is not handled")
        left, right = node.args
        if (scaled := self._scaled(kind, left, right)) is not None:
            self.views[node] = scaled
            return
        if not (self._is_value(left) and self._is_value(right)):
            self._with_constant(kind, node, left, right)
            return
        if kind == "div":
            _refuse(node, "div of two image values is not handled yet")
        (one, last), (other, other_last) = self._read(node, left), self._read(node, right)
        shape, other_shape = self.op_shapes[one], self.op_shapes[other]
        if kind == "mul" and math.prod(shape) < math.prod(other_shape):
            one, other, shape, other_shape = other, one, other_shape, shape
        factors = (*shape[:1], *(1 for _ in shape[1:]))  # one number a channel
        fits = other_shape == shape or (kind == "mul" and other_shape == factors)
        if not fits or (last != other_last and len(shape) > 1):
            _refuse(node, f"{kind} must be of two values of one shape, got {shape}, {other_shape}")
        if kind == "sub":  # one and the other's negative
            scale, shift = -torch.ones(shape[0]), torch.zeros(shape[0])
            other = self._emit(
                "affine", node, (other,), shape, last, attrs={"scale": scale, "shift": shift}
            )
        self._emit("product" if kind == "mul" else "add", node, (one, other), shape, last)

    def _scaled(self, how: str, left: Any, right: Any) -> View | Scores | None:
        """What a number makes of an attention's scores, or of its queries or keys; else None."""
        if how == "mul" and isinstance(left, int | float):
            left, right = right, left
        held = self.views.get(left) if isinstance(left, fx.Node) else None
        if how not in ("mul", "div") or not isinstance(right, int | float):
            return None
        factor = right if how == "mul" else 1 / right
        if isinstance(held, Scores) and not held.softmaxed:
            return replace(held, scale=held.scale * factor)
        heads = isinstance(held, View) and isinstance(held.source, int) and held.moved is not None
        if heads and isinstance(held, View) and movement.layout(held) is None:
            return replace(held, factor=held.factor * factor)
        return None

    def _with_constant(self, how: str, node: fx.Node, left: Any, right: Any) -> None:
        """x + a, x - a, x * a, x / a with a number or a tensor of the model."""
        if not self._is_value(left):
            if how not in ("add", "mul"):
                _refuse(node, f"a constant {how} a value is not handled")
            left, right = right, left
        value, last = self._read(node, left)
        shape = self.op_shapes[value]
        if isinstance(right, int | float):
            constant = torch.full(shape[:1], float(right))
        else:
            view = self._view(node, right)
            index = movement.constant_layout(view, (movement.IMAGES, *self.shapes[node]), last)
            if index is None or self._by_channel(node, last) != shape:
                _refuse(node, "a constant must hold one number per channel or position")
            tensor = tensor_of(self.model, str(view.source))
            if index.ndim > 1 or isinstance(tensor, nn.Parameter):
                attrs = {"how": how, "name": view.source, "index": index}
                self._emit("parameter", node, (value,), shape, last, attrs=attrs)
                return
            constant = tensor.detach().float().cpu().flatten()[index]
        one, zero = torch.ones_like(constant), torch.zeros_like(constant)
        scale, shift = {
            "mul": (constant, zero),
            "div": (1 / constant, zero),
            "add": (one, constant),
            "sub": (one, -constant),
        }[how]
        self._emit("affine", node, (value,), shape, last, attrs={"scale": scale, "shift": shift})

    # ---- maps

    def _on_map(
        self, kind: str, node: fx.Node, module: str | None, attrs: dict[str, Any] | None = None
    ) -> None:
        value = self._read_first(node, _source(node))
        self._emit(kind, node, (value,), self.shapes[node], module=module, attrs=attrs)

    def _pad(self, node: fx.Node) -> None:
        mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", 0)
        if mode != "constant" or value != 0:
            _refuse(node, "only padding with zeros is handled")
        self._padded(node, _argument(node, 1, "pad"))

    def _padded(self, node: fx.Node, pad: Sequence[int]) -> None:
        """Zeros around a map; negative: a part of it."""
        shape = self.op_shapes[self._read_first(node, _source(node))]
        if len(shape) != 3 or len(pad) > 4:
            _refuse(node, "only the rows and columns of a map are padded")
        places = torch.arange(math.prod(shape[1:])).view(shape[1:])
        positions = F.pad(places, list(pad), value=-1)
        self._on_map("pick", node, None, {"positions": positions})

    def _group_norm(self, node: fx.Node) -> None:
        """F.group_norm; its weights must be those of an nn.GroupNorm."""
        owned = self._owner(node, {"weight": 2, "bias": 3}, nn.GroupNorm)
        attrs = {"groups": node.args[1], "eps": _argument(node, 4, "eps", 1e-5)}
        self._elementwise("groupnorm", node, attrs, None if owned is None else owned[0])

    def _maxpool(self, node: fx.Node) -> None:
        kernel = _argument(node, 1, "kernel_size")
        self._pool(
            "maxpool", node, kernel, _argument(node, 2, "stride") or kernel,
            _argument(node, 3, "padding", 0), bool(_argument(node, 5, "ceil_mode", False)),
            True, _argument(node, 4, "dilation", 1), None,
        )  # fmt: skip

    def _avgpool(self, node: fx.Node) -> None:
        kernel = _argument(node, 1, "kernel_size")
        self._pool(
            "avgpool", node, kernel, _argument(node, 2, "stride") or kernel,
            _argument(node, 3, "padding", 0), bool(_argument(node, 4, "ceil_mode", False)),
            bool(_argument(node, 5, "count_include_pad", True)), 1,
            _argument(node, 6, "divisor_override"),
        )  # fmt: skip

    def _pool(
        self, kind: str, node: fx.Node, kernel: Any, stride: Any, padding: Any,
        ceil_mode: bool, include: bool, dilation: Any, divisor: Any,
    ) -> None:  # fmt: skip
        if _pair(dilation) != (1, 1) or divisor is not None:
            _refuse(node, "dilation and divisors are not handled")
        if _pair(kernel) == (1, 1) and _pair(stride) == (1, 1):
            self._identity(node)
            return
        window = {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)}
        attrs = window | {"count_include_pad": include, "ceil_mode": ceil_mode}
        self._on_map(kind, node, None, attrs)

    def _adaptive_pool(self, node: fx.Node) -> None:
        before = self.op_shapes[self._read_first(node, _source(node))]
        after = self.shapes[node]
        if before == after:
            self._identity(node)
        elif after[1:] == (1, 1):
            self._on_map("globalpool", node, None)
        elif before[1] % after[1] == 0 and before[2] % after[2] == 0:
            size = (before[1] // after[1], before[2] // after[2])
            self._pool("avgpool", node, size, size, 0, False, True, 1, None)
        elif after[1] % before[1] == 0 and after[2] % before[2] == 0:  # each pixel several times
            rows = torch.arange(after[1]) // (after[1] // before[1])
            columns = torch.arange(after[2]) // (after[2] // before[2])
            positions = rows[:, None] * before[2] + columns
            self._on_map("pick", node, None, {"positions": positions})
        else:
            _refuse(node, f"adaptive pooling from {before[1:]} to {after[1:]} is not handled")

    # ---- maps, tokens and features

    def _linear(self, node: fx.Node, name: str) -> None:
        value, last = self._read_last(node, _source(node))
        self._emit("linear", node, (value,), self._by_channel(node, last), last, name)

    def _function_linear(self, node: fx.Node) -> None:
        """F.linear; its tensors must be those of an nn.Linear."""
        owned = self._owner(node, {"weight": 1, "bias": 2}, nn.Linear)
        assert owned is not None
        self._linear(node, owned[0])

    def _owner(
        self, node: fx.Node, tensors: dict[str, int], kinds: type | UnionType
    ) -> tuple[str, nn.Module] | None:
        """The module, of one of ``kinds``, whose own tensors a function takes; None if it takes
        none. tensors: their names and the positions of the arguments."""
        names = {
            key: str(self._view(node, argument).source)
            for key, position in tensors.items()
            if (argument := _argument(node, position, key)) is not None
        }
        if not names:
            return None
        owner = next(iter(names.values())).rpartition(".")[0]
        module = self.model.get_submodule(owner)
        own = {key: f"{owner}.{key}" for key in tensors if getattr(module, key, None) is not None}
        if not isinstance(module, kinds) or own != names:
            _refuse(node, f"must take the tensors of one module, got {', '.join(names.values())}")
        return owner, module

    def _batch_norm(self, node: fx.Node) -> None:
        """F.batch_norm; its tensors must be those of an nn.BatchNorm."""
        tensors = {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4}
        owned = self._owner(node, tensors, nn.BatchNorm2d | nn.BatchNorm1d)
        if _argument(node, 5, "training", False) or owned is None:
            _refuse(node, "must take its statistics from the module, not from the images")
        name, module = owned
        if module.eps != _argument(node, 7, "eps", 1e-5):
            _refuse(node, f"must have the epsilon of {name}")
        self._on_map("norm", node, name)

    def _layer_norm(self, node: fx.Node) -> None:
        """F.layer_norm; its weights must be those of an nn.LayerNorm."""
        owned = self._owner(node, {"weight": 2, "bias": 3}, nn.LayerNorm)
        owner = None if owned is None else owned[0]
        shape = tuple(_argument(node, 1, "normalized_shape"))
        self._normalise(node, owner, shape, _argument(node, 4, "eps", 1e-5))

    def _normalise(
        self, node: fx.Node, owner: str | None, normalised: tuple[int, ...], eps: float
    ) -> None:
        value, last = self._read_last(node, _source(node))
        shape = self.op_shapes[value]
        if normalised != shape[:1]:
            _refuse(node, f"layer norm must be over the channels alone, not {normalised}")
        self._emit("layernorm", node, (value,), shape, last, owner, {"eps": eps})

    def _mean(self, node: fx.Node) -> None:
        value, last = self._read(node, _source(node))
        channels, *space = self.op_shapes[value]
        count = len(space) + 2
        dims = _argument(node, 1, "dim", 0)
        axes = {d % count for d in (dims if isinstance(dims, list | tuple) else [dims])}
        if not space or axes != set(range(1, count)) - {count - 1 if last else 1}:
            _refuse(node, "only the mean over all positions is handled")
        pooled = self._emit("globalpool", node, (value,), (channels, *(1,) * len(space)), last)
        if not _argument(node, 2, "keepdim", False):
            self._emit("flatten", node, (pooled,), (channels,))

    def _concat(self, node: fx.Node) -> None:
        parts = _argument(node, 0, "tensors")
        if not isinstance(parts, list | tuple):
            _refuse(node, "must list its tensors one by one")
        count = len(self.shapes[node]) + 1
        dim = _argument(node, 1, "dim", 0) % count
        images = [self._read(node, part) for part in parts if self._is_value(part)]
        if not images or len({last for _, last in images}) > 1:
            _refuse(node, "concatenated values must have their channels in one place")
        last = images[0][1]
        if dim == (count - 1 if last else 1) and len(images) == len(parts):
            values = tuple(value for value, _ in images)
            self._emit("concat", node, values, self._by_channel(node, last), last)
        elif count == 3 and dim == (1 if last else 2) and len(images) == 1:
            self._extend(node, parts, *images[0])
        else:
            _refuse(node, "only channels, or one value's tokens and constants, are concatenated")

    def _extend(self, node: fx.Node, parts: Sequence[Any], value: int, last: bool) -> None:
        """Concatenate tokens of the model's own before and behind those of a value."""
        place = next(i for i, part in enumerate(parts) if self._is_value(part))
        for number in (*range(place - 1, -1, -1), *range(place + 1, len(parts))):
            part = parts[number]
            view = self._view(node, part)
            shape = (movement.IMAGES, *self.shapes[part])
            index = movement.constant_layout(view, shape, last)
            if index is None:
                _refuse(node, f"{part} must be the same for every image")
            channels, tokens = self.op_shapes[value]
            index = index.view(channels, -1).expand(-1, self._by_channel(part, last)[1])
            attrs = {"name": view.source, "index": index, "front": number < place}
            value = self._emit(
                "extend", node, (value,), (channels, tokens + index.shape[1]), last, attrs=attrs
            )

    def _attention(self, node: fx.Node) -> None:
        options = ((3, "attn_mask"), (4, "dropout_p"), (5, "is_causal"), (7, "enable_gqa"))
        for position, name in options:
            if _argument(node, position, name):
                _refuse(node, f"attention with {name} is not handled")
        scale = _argument(node, 6, "scale")
        if isinstance(scale, fx.Node):
            _refuse(node, "attention's scale must be a number")
        names = ("query", "key", "value")
        query, key, value = (self._view(node, _argument(node, *at)) for at in enumerate(names))
        scale = query.places().shape[-1] ** -0.5 if scale is None else scale
        self._attend(node, query, key, value, scale * query.factor * key.factor)

    def _matmul(self, node: fx.Node) -> None:
        """Queries times keys, or what a softmax made of them times values."""
        left, right = node.args
        weights = self.views.get(left) if isinstance(left, fx.Node) else None
        if isinstance(weights, Scores):
            if not weights.softmaxed:
                _refuse(node, "an attention's scores must go through a softmax")
            self._attend(node, weights.query, weights.key, self._view(node, right), weights.scale)
            return
        found = movement.scores(self._view(node, left), self._view(node, right))
        if found is None:
            _refuse(node, "only products of an attention's queries and keys are handled")
        self.views[node] = found

    def _softmax(self, node: fx.Node) -> None:
        self._softmax_over(node, _argument(node, 1, "dim"))

    def _softmax_over(self, node: fx.Node, dim: int | None) -> None:
        held = self.views.get(_source(node))
        if not isinstance(held, Scores) or dim not in (-1, len(self.shapes[node])):
            _refuse(node, "a softmax must be of an attention's scores, over the keys")
        self.views[node] = replace(held, softmaxed=True)

    def _attend(self, node: fx.Node, query: View, key: View, value: View, scale: float) -> None:
        attrs: dict[str, Any] = {"scale": scale}
        inputs = []
        for letter, view in (("q", query), ("k", key), ("v", value)):
            channels = movement.head_channels(view)
            if channels is None or not isinstance(view.source, int):
                _refuse(
                    node,
                    "attention must read queries, keys and values as [N, heads, tokens, channels]",
                )
            attrs[letter] = channels
            inputs.append(view.source)
        if value.factor != 1:
            _refuse(node, "attention must not scale its values")
        if len({len(attrs[key]) for key in "qkv"}) > 1:
            _refuse(node, "attention must have as many heads of keys and values as of queries")
        heads, width = attrs["v"].shape
        tokens = self.shapes[node][-2]
        self._emit("attention", node, tuple(inputs), (heads * width, tokens), attrs=attrs)
        split = (movement.IMAGES, *((heads,) if len(self.shapes[node]) == 3 else ()), width, tokens)
        view = self._view(node, node)
        self.views[node] = view.after(lambda places: places.view(split).transpose(-1, -2))

    def _multihead_attention(self, node: fx.Node, name: str, module: nn.MultiheadAttention) -> None:
        """Of one value with itself: a linear layer, attention and another linear layer."""
        query = _argument(node, 0, "query")
        alone = all(_argument(node, at, key) is query for at, key in ((1, "key"), (2, "value")))
        masks = (_argument(node, 3, "key_padding_mask"), _argument(node, 5, "attn_mask"))
        plain = module.in_proj_weight is not None and module.bias_k is None
        if not alone or masks != (None, None) or not plain or module.add_zero_attn:
            _refuse(node, "attention must be of one value with itself, without masks or added keys")
        if not module.batch_first:
            _refuse(node, "attention must have batch_first=True, [N, tokens, features]")
        value, last = self._read_last(node, query)
        channels, tokens = self.op_shapes[value]
        made = self._emit("linear", node, (value,), (3 * channels, tokens), last, name)
        split = torch.arange(3 * channels).view(3, module.num_heads, module.head_dim)
        heads = dict(zip("qkv", split, strict=True))
        shape = (channels, tokens)
        attended = self._emit("attention", node, (made,) * 3, shape, attrs=heads | {"scale": None})
        self._emit("linear", node, (attended,), shape, True, f"{name}.out_proj")
        self.views[node] = (self._view(node, node),)  # the weights, second, are not handled


def _refuse(node: fx.Node, reason: str) -> NoReturn:
    raise UntraceableModel(f"{node.name}: {reason}")


def _source(node: fx.Node) -> Any:
    """The tensor that a node works on: its first argument."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return default if value is None else value


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _refuse_shared_weights(ops: list[Op]) -> None:
    seen: set[str] = set()
    for op in ops:
        if op.module and op.module in seen:
            raise UntraceableModel(f"{op.module}: a module that is called twice is not handled")
        seen.update([op.module] if op.module else [])
