"""Turn a traceable ``nn.Module`` into operations, sites and groups.

``torch.fx`` records what the network does; each node becomes an ``Op``. Pairing of convolutions,
norms and activations comes from that graph alone, never from module order or names.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onp.errors import UntraceableModel
from onp.suspect.architectures.resnet import SubsamplePad
from onp.suspect.channels import Channels, couple

WEIGHTED = ("conv", "linear")
TRANSPARENT = ("maxpool", "avgpool", "globalpool", "flatten")
"""Kinds that map zero channels to zero channels and hold no weights."""
ACTIVATIONS = ("relu", "relu6")


@dataclass(frozen=True)
class Op:
    """One operation of the traced network; value ``i`` is the output of ``trace.ops[i]``.

    kind: one of
      input                     the images, [N, C, H, W]
      conv, linear              ``module`` is the nn.Conv2d / nn.Linear's qualified name
      norm                      ``module`` is a BatchNorm2d/1d in eval mode (per-channel affine)
      affine                    per-channel scale and shift: attrs["scale"], attrs["shift"] [C]
      relu, relu6               no attrs
      add                       two inputs of the same shape
      maxpool, avgpool          attrs: kernel, stride, padding (int pairs), count_include_pad
      globalpool                mean over H and W, keeps [N, C, 1, 1]
      subsample_pad             option-A shortcut: x[:, :, ::s, ::s] with its channels written to
                                attrs["positions"] (of attrs["channels"]); attrs["stride"]
      flatten                   [N, C, H, W] -> [N, C*H*W]
      output                    reads the logits
    Identity and (eval-mode) dropout are elided.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    module: str | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteLayer:
    """The channels of one value, as one set of consumers reads them.

    Masking a site = zero at its consumers' input. Site numbers of the layer are
    ``start .. start + channels - 1``; layers are numbered in execution order.
    """

    name: str
    """Readable name: the norm's module name, else the nearest producer's."""
    value: int
    """Op index whose output the consumers read (before pools and flatten)."""
    start: int
    channels: int
    consumers: tuple[int, ...]
    """Op indices of the conv/linear that read the value through pools and flatten only."""
    masked_edges: frozenset[tuple[int, int]]
    """(reader op, input position) pairs that read the *masked* copy of the value; all other
    readers (a residual add, say) read it unmasked."""
    norm: int | None
    """Op index of the norm whose scale and shift can be zeroed to apply a mask: set only if
    everything between the norm and the masked readers is elementwise and read by nothing else."""
    producers: tuple[int, ...]
    """Op indices of the conv/linear whose output channels reach this value one to one without
    passing another conv/linear (several for a residual stream), nearest first."""

    @property
    def sites(self) -> slice:
        """The layer's site numbers."""
        return slice(self.start, self.start + self.channels)


@dataclass(frozen=True)
class Trace:
    """What onp knows about one network."""

    ops: tuple[Op, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Output shape of each op without the batch dimension: (C, H, W), or (F,) after flatten."""
    layers: tuple[SiteLayer, ...]
    channels: Channels
    """Which channels of which values are coupled (residual sums, depthwise convolutions)."""
    group_of_site: Tensor
    """int64 [S]: sites with the same number are one coupled channel (a group)."""
    num_classes: int

    @property
    def sites(self) -> int:
        """S, the number of sites."""
        return int(self.group_of_site.shape[0])

    def consumer_span(self, layer: SiteLayer, consumer: int) -> int:
        """Input features of ``consumer`` a channel of ``layer`` feeds: H*W after a flatten."""
        fed = self.shapes[self.ops[consumer].inputs[0]][0]
        return fed // layer.channels


def trace(model: nn.Module, image_shape: tuple[int, int, int]) -> Trace:
    """Trace ``model`` on images of ``image_shape`` (C, H, W).

    The model must be in eval mode; it is not changed. Raises UntraceableModel, naming the module
    or function that cannot be handled.
    """
    try:
        graph = fx.GraphModule(model, _Tracer().trace(model))
    except UntraceableModel:
        raise
    except Exception as error:  # fx raises many kinds for data-dependent control flow
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UntraceableModel(f"cannot trace {type(model).__name__}: {reason}") from error
    shapes = _node_shapes(graph, model, image_shape)
    ops, values = _Lowering(graph, shapes).run()
    op_shapes = tuple(shapes[node] for node in values)
    _refuse_shared_weights(ops)
    readers = _readers(ops)
    channels = couple(ops, op_shapes, graph)
    layers = _site_layers(ops, op_shapes, readers)
    if not layers:
        raise UntraceableModel(f"{type(model).__name__} has no prunable channels")
    raw = torch.cat([channels.of_value[layer.value] for layer in layers])
    groups = raw.unique(return_inverse=True)[1]
    return Trace(
        tuple(ops), op_shapes, tuple(layers), channels, groups, op_shapes[ops[-1].inputs[0]][0]
    )


# ---- from fx nodes to ops -----------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, SubsamplePad) or super().is_leaf_module(m, qualified_name)


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape[1:])
        return value


def _node_shapes(
    graph: fx.GraphModule, model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[fx.Node, tuple[int, ...]]:
    parameter = next(model.parameters(), torch.zeros(()))
    sample = torch.zeros(2, *image_shape, dtype=parameter.dtype, device=parameter.device)
    recorder = _ShapeRecorder(graph)
    try:
        with torch.no_grad():
            recorder.run(sample)
    except Exception as error:  # shapes can fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UntraceableModel(
            f"{type(model).__name__} does not accept images of shape {image_shape}: {reason}"
        ) from error
    return recorder.shapes


_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu", torch.relu_: "relu",
    F.relu6: "relu6",
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add", "add_": "add",
    torch.flatten: "flatten", "flatten": "flatten", "view": "flatten", "reshape": "flatten",
    torch.reshape: "flatten",
    F.avg_pool2d: "avgpool", torch._C._nn.avg_pool2d: "avgpool",
    F.max_pool2d: "maxpool", torch.max_pool2d: "maxpool",
    F.adaptive_avg_pool2d: "globalpool", "mean": "mean", torch.mean: "mean",
    F.dropout: "dropout", "contiguous": "identity", "float": "identity",
    operator.sub: "sub", torch.sub: "sub", "sub": "sub",
    operator.truediv: "div", torch.div: "div", "div": "div",
    operator.mul: "mul", torch.mul: "mul", "mul": "mul",
}  # fmt: skip
_SHAPE_ONLY = {"size", getattr, operator.getitem, operator.floordiv}


class _Lowering:
    """Walks the fx graph once and writes the ops."""

    def __init__(self, graph: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.ops: list[Op] = []
        self.nodes: list[fx.Node] = []
        self.value_of: dict[fx.Node, int] = {}

    def run(self) -> tuple[list[Op], list[fx.Node]]:
        for node in self.graph.graph.nodes:
            getattr(self, f"_{node.op}")(node)
        return self.ops, self.nodes

    def _emit(
        self,
        kind: str,
        node: fx.Node,
        inputs: tuple[Any, ...],
        module: str | None = None,
        **attrs: Any,
    ) -> None:
        missing = [arg for arg in inputs if arg not in self.value_of]
        if missing:
            raise UntraceableModel(
                f"{node.name} ({kind}) reads {missing[0]}, which is no image value"
            )
        self.value_of[node] = len(self.ops)
        self.ops.append(Op(kind, node.name, tuple(self.value_of[a] for a in inputs), module, attrs))
        self.nodes.append(node)

    def _placeholder(self, node: fx.Node) -> None:
        if self.ops:
            raise UntraceableModel(f"the network takes a second input, {node.name}")
        self._emit("input", node, ())

    def _output(self, node: fx.Node) -> None:
        logits = node.args[0]
        if not isinstance(logits, fx.Node) or len(self.shapes.get(logits, ())) != 1:
            raise UntraceableModel("the network must return one tensor of logits [N, classes]")
        self.shapes[node] = self.shapes[logits]
        self._emit("output", node, (logits,))

    def _get_attr(self, node: fx.Node) -> None:
        """A constant; read when an affine operation uses it."""

    def _call_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.graph.get_submodule(name)
        source = node.args[0]
        simple = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Flatten: "flatten"}
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise UntraceableModel(f"{name}: only explicit zero padding is handled")
            self._emit("conv", node, (source,), name)
        elif isinstance(module, nn.Linear):
            if len(self.shapes[source]) != 1:  # type: ignore[index]
                raise UntraceableModel(f"{name}: a linear layer must read [N, features]")
            self._emit("linear", node, (source,), name)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            if module.running_mean is None:
                raise UntraceableModel(f"{name}: a batch norm without running statistics")
            self._emit("norm", node, (source,), name)
        elif type(module) in simple:
            self._emit(simple[type(module)], node, (source,))
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            self._alias(node, source)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            self._pool(
                "maxpool" if isinstance(module, nn.MaxPool2d) else "avgpool", node, source,
                module.kernel_size, module.stride, module.padding,
                bool(module.ceil_mode), getattr(module, "count_include_pad", True),
                getattr(module, "dilation", 1), getattr(module, "divisor_override", None),
            )  # fmt: skip
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node, source)
        elif isinstance(module, SubsamplePad):
            self._emit(
                "subsample_pad", node, (source,), name,
                positions=list(module.positions), channels=module.channels, stride=module.stride,
            )  # fmt: skip
        else:
            raise UntraceableModel(
                f"{name}: modules of type {type(module).__name__} are not handled yet"
            )

    def _call_function(self, node: fx.Node) -> None:
        if node.target in _SHAPE_ONLY and node not in self.shapes:
            return
        kind = _FUNCTIONS.get(node.target)
        name = getattr(node.target, "__name__", str(node.target))
        if kind is None:
            raise UntraceableModel(f"{node.name}: the function {name} is not handled yet")
        self._functional(kind, node)

    def _call_method(self, node: fx.Node) -> None:
        if node.target in _SHAPE_ONLY:
            return
        kind = _FUNCTIONS.get(node.target)
        if kind is None:
            raise UntraceableModel(f"{node.name}: the method .{node.target}() is not handled yet")
        self._functional(kind, node)

    def _functional(self, kind: str, node: fx.Node) -> None:
        source = node.args[0] if node.args else node.kwargs.get("input")

        def argument(position: int, name: str, default: Any) -> Any:
            value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
            return default if value is None else value

        if kind not in ("add", "sub", "mul", "div") and source not in self.shapes:
            raise UntraceableModel(f"{node.name}: {kind} must read a value as first argument")
        if kind == "identity":
            self._alias(node, source)
        elif kind == "dropout":
            if argument(2, "training", True) is not False:
                raise UntraceableModel(f"{node.name}: F.dropout stays on; pass training=False")
            self._alias(node, source)
        elif kind in ("relu", "relu6"):
            self._emit(kind, node, (source,))
        elif kind == "flatten":
            features = 1
            for size in self.shapes[source]:  # type: ignore[index]
                features *= size
            if self.shapes[node] != (features,):
                raise UntraceableModel(f"{node.name}: only flattening to [N, features] is handled")
            self._alias(node, source) if len(self.shapes[source]) == 1 else self._emit(  # type: ignore[index]
                "flatten", node, (source,)
            )
        elif kind in ("maxpool", "avgpool"):
            kernel = argument(1, "kernel_size", None)
            after = (
                ("dilation", "ceil_mode")
                if kind == "maxpool"
                else ("ceil_mode", "count_include_pad")
            )
            options = {name: argument(4 + i, name, None) for i, name in enumerate(after)}
            include = options.get("count_include_pad")
            divisor = argument(6, "divisor_override", None) if kind == "avgpool" else None
            self._pool(
                kind, node, source, kernel,
                argument(2, "stride", kernel) or kernel, argument(3, "padding", 0),
                bool(options["ceil_mode"]), True if include is None else bool(include),
                options.get("dilation") or 1, divisor,
            )  # fmt: skip
        elif kind == "globalpool":
            self._adaptive_pool(node, source)
        elif kind == "mean":
            self._mean(node, source)
        elif kind == "add" and all(
            isinstance(arg, fx.Node) and arg in self.value_of for arg in node.args[:2]
        ):
            shapes = [self.shapes[arg] for arg in node.args[:2] if isinstance(arg, fx.Node)]
            if argument(2, "alpha", 1) != 1 or shapes[0] != shapes[1]:
                raise UntraceableModel(f"{node.name}: a sum must add two values of one shape")
            self._emit("add", node, tuple(node.args[:2]))
        else:
            self._affine(kind, node)

    def _alias(self, node: fx.Node, source: Any) -> None:
        self.value_of[node] = self.value_of[source]

    def _pool(
        self, kind: str, node: fx.Node, source: Any, kernel: Any, stride: Any, padding: Any,
        ceil_mode: bool, include: bool, dilation: Any, divisor: Any,
    ) -> None:  # fmt: skip
        if ceil_mode or _pair(dilation) != (1, 1) or divisor is not None:
            raise UntraceableModel(f"{node.name}: ceil_mode, dilation and divisors are not handled")
        if _pair(kernel) == (1, 1) and _pair(stride) == (1, 1):
            self._alias(node, source)
            return
        self._emit(
            kind, node, (source,), kernel=_pair(kernel), stride=_pair(stride),
            padding=_pair(padding), count_include_pad=include,
        )  # fmt: skip

    def _adaptive_pool(self, node: fx.Node, source: Any) -> None:
        before, after = self.shapes[source], self.shapes[node]
        if before == after:
            self._alias(node, source)
        elif after[1:] == (1, 1):
            self._emit("globalpool", node, (source,))
        elif before[1] % after[1] == 0 and before[2] % after[2] == 0:
            size = (before[1] // after[1], before[2] // after[2])
            self._pool("avgpool", node, source, size, size, 0, False, True, 1, None)
        else:
            raise UntraceableModel(
                f"{node.name}: adaptive pooling from {before[1:]} to {after[1:]} is not handled"
            )

    def _mean(self, node: fx.Node, source: Any) -> None:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
        axes = {d % 4 for d in dims} if isinstance(dims, list | tuple) else set()
        if axes != {2, 3} or len(self.shapes[source]) != 3:
            raise UntraceableModel(f"{node.name}: only the mean over height and width is handled")
        self._emit("globalpool", node, (source,))
        if not keep:  # the op keeps 1x1; flattening it gives what the network computes
            pooled = len(self.ops) - 1
            self.ops.append(Op("flatten", f"{node.name}_flat", (pooled,)))
            self.nodes.append(node)
            self.value_of[node] = pooled + 1

    def _affine(self, kind: str, node: fx.Node) -> None:
        """x * a, x / a, x + a, x - a with a constant per channel or one for all."""
        if len(node.args) != 2 or node.kwargs:
            raise UntraceableModel(f"{node.name}: {kind} with keywords is not handled")
        left, right = node.args
        if not (isinstance(left, fx.Node) and left in self.value_of):
            if kind not in ("add", "mul"):
                raise UntraceableModel(f"{node.name}: a constant {kind} a value is not handled")
            left, right = right, left
        constant = self._constant(right)
        if not (isinstance(left, fx.Node) and left in self.value_of) or constant is None:
            raise UntraceableModel(f"{node.name}: {kind} of two image values is not handled yet")
        channels = self.shapes[left][0]
        if constant.numel() not in (1, channels) or (
            constant.numel() > 1
            and constant.numel() != (constant.shape[-3] if constant.ndim >= 3 else -1)
        ):
            raise UntraceableModel(f"{node.name}: the constant must hold one number per channel")
        constant = constant.detach().float().reshape(-1).expand(channels).cpu()
        one, zero = torch.ones(channels), torch.zeros(channels)
        scale, shift = {
            "mul": (constant, zero),
            "div": (1 / constant, zero),
            "add": (one, constant),
            "sub": (one, -constant),
        }[kind]
        self._emit("affine", node, (left,), scale=scale.clone(), shift=shift.clone())

    def _constant(self, value: Any) -> Tensor | None:
        if isinstance(value, int | float):
            return torch.tensor(float(value))
        if isinstance(value, fx.Node) and value.op == "get_attr":
            found: Any = self.graph
            for part in str(value.target).split("."):
                found = getattr(found, part)
            return found if isinstance(found, Tensor) else None
        return None


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _refuse_shared_weights(ops: list[Op]) -> None:
    seen: set[str] = set()
    for op in ops:
        if op.module and op.module in seen:
            raise UntraceableModel(f"{op.module}: a module that is called twice is not handled")
        seen.update([op.module] if op.module else [])


# ---- sites --------------------------------------------------------------------------------------


def _readers(ops: list[Op]) -> list[list[tuple[int, int]]]:
    """(reader, input position) pairs of every value."""
    readers: list[list[tuple[int, int]]] = [[] for _ in ops]
    for index, op in enumerate(ops):
        for position, value in enumerate(op.inputs):
            readers[value].append((index, position))
    return readers


def _site_layers(
    ops: list[Op], shapes: tuple[tuple[int, ...], ...], readers: list[list[tuple[int, int]]]
) -> list[SiteLayer]:
    pure: dict[int, bool] = {}  # values read by conv/linear alone, through pools and flatten
    for value in range(len(ops) - 1, -1, -1):
        pure[value] = bool(readers[value]) and all(
            ops[reader].kind in WEIGHTED or (ops[reader].kind in TRANSPARENT and pure[reader])
            for reader, _ in readers[value]
        )
    consumers: dict[int, list[int]] = {}
    edges: dict[int, set[tuple[int, int]]] = {}
    for index, op in enumerate(ops):
        if op.kind not in WEIGHTED:
            continue
        edge, root = (index, 0), op.inputs[0]
        while ops[root].kind in TRANSPARENT and pure[root]:
            edge, root = (root, 0), ops[root].inputs[0]
        consumers.setdefault(root, []).append(index)
        edges.setdefault(root, set()).add(edge)

    layers: list[SiteLayer] = []
    start = 0
    for root in sorted(consumers):
        producers = _producers(ops, root)
        if not producers:
            continue  # the image's own channels
        all_masked = all(edge in edges[root] for edge in readers[root])
        norm = _owned_norm(ops, readers, root) if all_masked else None
        names = ops if norm is None else [ops[norm]]
        name = names[0].module if norm is not None else _readable(ops, root, producers)
        channels = shapes[root][0]
        layers.append(
            SiteLayer(
                str(name),
                root,
                start,
                channels,
                tuple(consumers[root]),
                frozenset(edges[root]),
                norm,
                producers,
            )
        )
        start += channels
    return layers


def _readable(ops: list[Op], root: int, producers: tuple[int, ...]) -> str:
    """The site's name where no norm is its own: the norm just before it, or its producer."""
    value = root
    while ops[value].kind in ACTIVATIONS:
        value = ops[value].inputs[0]
    if ops[value].kind == "norm":
        return str(ops[value].module)
    return f"{ops[producers[0]].module}:out"


def _producers(ops: list[Op], root: int) -> tuple[int, ...]:
    found: set[int] = set()
    stack, seen = [root], set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if ops[value].kind in WEIGHTED:
            found.add(value)
        else:
            stack.extend(ops[value].inputs)
    return tuple(sorted(found, reverse=True))


def _owned_norm(ops: list[Op], readers: list[list[tuple[int, int]]], root: int) -> int | None:
    value = root
    while ops[value].kind in ACTIVATIONS:
        value = ops[value].inputs[0]
        if len(readers[value]) != 1:
            return None
    return value if ops[value].kind == "norm" else None
