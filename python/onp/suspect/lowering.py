"""From a module to operations: every node that ``torch.fx`` recorded becomes an ``Op``, or part of
one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onp.errors import UntraceableModel
from onp.suspect import movement
from onp.suspect.architectures.resnet import SubsamplePad
from onp.suspect.movement import View
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
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add", "add_": "add",
    F.avg_pool2d: "avgpool", torch._C._nn.avg_pool2d: "avgpool",
    F.max_pool2d: "maxpool", torch.max_pool2d: "maxpool",
    F.adaptive_avg_pool2d: "adaptive_pool", "mean": "mean", torch.mean: "mean",
    F.dropout: "dropout", "contiguous": "identity", "float": "identity",
    operator.sub: "sub", torch.sub: "sub", "sub": "sub",
    operator.truediv: "div", torch.div: "div", "div": "div",
    operator.mul: "mul", torch.mul: "mul", "mul": "mul",
    torch.cat: "concat", torch.concat: "concat", F.layer_norm: "layer_norm",
    F.scaled_dot_product_attention: "attention",
}  # fmt: skip
_ELEMENTWISE = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
_ARITHMETIC = ("add", "sub", "mul", "div")


class _Lowering:
    """Walks the fx graph once and writes the ops."""

    def __init__(self, recording: Recording) -> None:
        self.model = recording.model
        self.graph = recording.graph
        self.shapes = recording.shapes
        self.sizes = recording.sizes
        self.ops: list[Op] = []
        self.op_shapes: list[tuple[int, ...]] = []
        self.views: dict[fx.Node, View | tuple[View, ...]] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output") or node not in self.sizes:
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
        found = movement.layout(view)
        if found is None:
            _refuse(node, f"reads {argument}, which takes channels apart or mixes them")
        shape, positions = view.shape, found.positions
        if positions is None and len(shape) == 1:
            self.views[argument] = View(view.source, shape)
        elif positions is None:
            self._emit("flatten", argument, (view.source,), (math.prod(shape),))
        elif positions.shape == shape[1:] and movement.in_order(positions):
            self.views[argument] = View(view.source, shape, found.last)
        else:
            self._emit(
                "pick", argument, (view.source,), (shape[0], *positions.shape),
                found.last, attrs={"positions": positions},
            )  # fmt: skip
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
        if self.ops:
            raise UntraceableModel(f"the network takes a second input, {node.name}")
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
        elif isinstance(module, nn.LayerNorm):
            owner = None if module.weight is None else name
            self._normalise(node, owner, module.normalized_shape, module.eps)
        elif type(module) in _ELEMENTWISE:
            self._elementwise(_ELEMENTWISE[type(module)], node)
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
        if kind is None:
            _refuse(node, f"{named} is not handled yet")
        elif kind in _ARITHMETIC:
            self._arithmetic(kind, node)
        elif kind in _ELEMENTWISE.values():
            self._elementwise(kind, node)
        else:
            getattr(self, f"_{kind}")(node)

    # ---- moves, and what does nothing

    def _identity(self, node: fx.Node) -> None:
        self.views[node] = self._view(node, _source(node))

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
            self.views[node] = parts[part]
            return
        numbers = self.sizes.__getitem__
        arguments = fx.node.map_arg(tuple(a for a in node.args if a is not source), numbers)
        keywords = fx.node.map_arg(
            {key: value for key, value in node.kwargs.items() if value is not source}, numbers
        )

        def move(places: Tensor) -> Any:
            run = getattr(Tensor, target) if isinstance(target, str) else target
            return run(places, *arguments, **keywords)

        self.views[node] = self._view(node, source).after(move)

    # ---- channel for channel

    def _elementwise(self, kind: str, node: fx.Node, attrs: dict[str, Any] | None = None) -> None:
        value, last = self._read(node, _source(node))
        self._emit(kind, node, (value,), self.op_shapes[value], last, attrs=attrs)

    def _gelu(self, node: fx.Node) -> None:
        approximate = _argument(node, 1, "approximate", "none")
        self._elementwise("gelu", node, {"approximate": approximate})

    def _arithmetic(self, kind: str, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
            _refuse(node, f"{kind} with keywords is not handled")
        left, right = node.args
        if not (self._is_value(left) and self._is_value(right)):
            self._with_constant(kind, node, left, right)
            return
        if kind != "add":
            _refuse(node, f"{kind} of two image values is not handled yet")
        (one, last), (other, other_last) = self._read(node, left), self._read(node, right)
        shape = self.op_shapes[one]
        if shape != self.op_shapes[other] or (last != other_last and len(shape) > 1):
            _refuse(node, "a sum must add two values of one shape")
        self._emit("add", node, (one, other), shape, last)

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
        if ceil_mode or _pair(dilation) != (1, 1) or divisor is not None:
            _refuse(node, "ceil_mode, dilation and divisors are not handled")
        if _pair(kernel) == (1, 1) and _pair(stride) == (1, 1):
            self._identity(node)
            return
        window = {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)}
        self._on_map(kind, node, None, window | {"count_include_pad": include})

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
        else:
            _refuse(node, f"adaptive pooling from {before[1:]} to {after[1:]} is not handled")

    # ---- maps, tokens and features

    def _linear(self, node: fx.Node, name: str) -> None:
        value, last = self._read_last(node, _source(node))
        self._emit("linear", node, (value,), self._by_channel(node, last), last, name)

    def _layer_norm(self, node: fx.Node) -> None:
        """F.layer_norm; its weights must be those of an nn.LayerNorm."""
        weights = {"weight": _argument(node, 2, "weight"), "bias": _argument(node, 3, "bias")}
        names = {
            key: str(self._view(node, argument).source)
            for key, argument in weights.items()
            if argument is not None
        }
        owner = names["weight"].rpartition(".")[0] if "weight" in names else None
        if owner is not None:
            module = self.model.get_submodule(owner)
            own = {key: f"{owner}.{key}" for key, _ in module.named_parameters(recurse=False)}
            if not isinstance(module, nn.LayerNorm) or own != names:
                _refuse(node, "layer norm must use the weights of one nn.LayerNorm")
        elif names:
            _refuse(node, "a layer norm with a bias alone is not handled")
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
            if scale not in self.sizes:
                _refuse(node, "attention's scale must be a number")
            scale = self.sizes[scale]
        attrs: dict[str, Any] = {"scale": scale}
        inputs = []
        for position, (key, name) in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
            view = self._view(node, _argument(node, position, name))
            channels = movement.head_channels(view)
            if channels is None or not isinstance(view.source, int):
                _refuse(node, f"attention must read its {name} as [N, heads, tokens, channels]")
            attrs[key] = channels
            inputs.append(view.source)
        if len({len(attrs[key]) for key in "qkv"}) > 1:
            _refuse(node, "attention must have as many heads of keys and values as of queries")
        heads, width = attrs["v"].shape
        tokens = self.shapes[node][-2]
        self._emit("attention", node, tuple(inputs), (heads * width, tokens), attrs=attrs)
        split = (movement.IMAGES, *((heads,) if len(self.shapes[node]) == 3 else ()), width, tokens)
        view = self._view(node, node)
        self.views[node] = view.after(lambda places: places.view(split).transpose(-1, -2))


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
