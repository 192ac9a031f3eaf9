"""From a traced network to the program of a masked forward (``_masked_forward_steps``).

A norm behind a convolution folds into its weights, and the residual sum of a pre-activation block
(``plain``) leaves together with the masked input of the next block (``final``). Tokens
[C, T] are maps [C, T, 1]; what the model adds to them at every position is a residual that never
changes (a constant).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onp.errors import UnsupportedOperation
from onp.ops._masked_forward_steps import (
    ACTIVATIONS,
    ATTENTION,
    AVERAGE_POOL,
    CONCATENATION,
    CONVOLUTION,
    GELU,
    GROUP_NORM,
    LAYER_NORM,
    MAX_POOL,
    NONE,
    PICK,
    PLAIN,
    PRODUCT,
    RESIDUAL,
    Pair,
    Program,
    Step,
)

if TYPE_CHECKING:
    from onp.suspect.operations import Op
    from onp.suspect.trace import Trace

Copy = tuple[int, int | None]
"""A value as its readers see it: op index, and the site layer that masks it (None: unmasked)."""

_ELEMENTWISE = ("norm", "affine", "parameter", *ACTIVATIONS, "gelu", "add")
_OF_PIXELS = ("pick", "select", "extend", "layernorm", "groupnorm", "attention")
"""Kinds that know channels from positions: a flattened map has not."""


@dataclass
class Lowering:
    """One pass over the trace: each operation that no earlier step absorbed opens a step."""

    trace: Trace
    model: nn.Module
    buffers: list[tuple[int, int, int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    buffer_of: dict[Copy, int] = field(default_factory=dict)
    absorbed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.layer_of_edge = {
            edge: index
            for index, layer in enumerate(self.trace.layers)
            for edge in layer.masked_edges
        }
        self.shapes = self._unflattened_shapes()
        self.readers: list[list[tuple[int, int]]] = [[] for _ in self.trace.ops]
        for index in range(len(self.trace.ops) - 1, -1, -1):
            op = self.trace.ops[index]
            if op.kind == "flatten" or not (op.kind == "output" or self.readers[index]):
                continue  # what nobody reads reads nothing
            for position in range(len(op.inputs)):
                self.readers[self._copy(index, position)[0]].append((index, position))

    def run(self) -> Program:
        """The program. Raises UnsupportedOperation."""
        output: int | None = None
        for index, op in enumerate(self.trace.ops):
            if op.kind == "input":
                self._open_input(index)
            elif op.kind == "output":
                output = self._buffer(index, 0)
            elif index not in self.absorbed and self.readers[index]:
                self._finish(*self._extend(self._open(index, op), index))
        if output is None or self.buffers[output][1:] != (1, 1):
            raise UnsupportedOperation("masked_forward: the network must end in logits [N, K]")
        return Program(self.buffers, self.steps, self.constants, output)

    def _unflattened_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of every value; a flattened one keeps the shape that it was flattened from."""
        shapes: list[tuple[int, int, int]] = []
        for op, shape in zip(self.trace.ops, self.trace.shapes, strict=True):
            if op.kind in ("flatten", "output", "layernorm", "groupnorm", "product", *_ELEMENTWISE):
                shapes.append(shapes[op.inputs[0]])
            elif op.kind == "concat":
                parts = [shapes[value] for value in op.inputs]
                shapes.append((sum(part[0] for part in parts), *parts[0][1:]))
            else:
                channels, height, width = (*shape, 1, 1)[:3]
                shapes.append((channels, height, width))
        return shapes

    def _copy(self, reader: int, position: int) -> Copy:
        """What an operation reads at one of its inputs, looked up through flattening."""
        value = self.trace.ops[reader].inputs[position]
        layer = self.layer_of_edge.get((reader, position))
        while self.trace.ops[value].kind == "flatten":
            layer = self.layer_of_edge.get((value, 0)) if layer is None else layer
            value = self.trace.ops[value].inputs[0]
        return value, layer

    def _buffer(self, reader: int, position: int) -> int:
        return self.buffer_of[self._copy(reader, position)]

    def _new_buffer(self, copy: Copy) -> int:
        self.buffers.append(self.shapes[copy[0]])
        self.buffer_of[copy] = len(self.buffers) - 1
        return self.buffer_of[copy]

    def _wanted(self, value: int, but: int | None = None) -> set[int | None]:
        """The copies of a value that its readers need, those of the reader ``but`` left out."""
        edges = (edge for edge in self.readers[value] if edge[0] != but)
        return {self._copy(*edge)[1] for edge in edges}

    # ---- opening a step

    def _open_input(self, index: int) -> None:
        self._new_buffer((index, None))
        for layer in self._wanted(index) - {None}:
            self._emit_copy(index, layer)

    def _open(self, index: int, op: Op) -> Step:
        step = Step(op.name, MAX_POOL, self._buffer(index, 0), self.shapes[index][0])
        if op.kind == "conv":
            self._open_conv(step, op)
        elif op.kind == "linear":
            self._open_linear(step, index, op)
        elif op.kind in ("maxpool", "avgpool", "globalpool"):
            self._open_pool(step, index, op)
        elif op.kind == "subsample_pad":
            self._open_subsample(step, op)
        elif op.kind == "concat":
            self._open_concatenation(step, index, op)
        elif op.kind == "product":
            self._open_product(step, index, op)
        elif op.kind in _OF_PIXELS and not self._by_pixel(op):
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must read maps or tokens, not flattened ones"
            )
        elif op.kind == "select":
            self._open_select(step, index, op)
        elif op.kind in ("pick", "extend"):
            self._open_pick(step, index, op)
        elif op.kind == "layernorm":
            self._open_norm(step, op)
        elif op.kind == "groupnorm":
            self._open_norm(step, op)
            step.kind, step.heads = GROUP_NORM, int(op.attrs["groups"])
        elif op.kind == "attention":
            self._open_attention(step, index, op)
        elif op.kind not in _ELEMENTWISE or not self._absorb(step, index, index):
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must be an operation that the engine has, got {op.kind}"
            )
        return step

    def _open_conv(self, step: Step, op: Op) -> None:
        conv = self.modules[op.module or ""]
        if not isinstance(conv, nn.Conv2d) or conv.dilation != (1, 1):
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must be an undilated Conv2d, got {conv}"
            )
        if conv.padding_mode != "zeros" and conv.padding not in ((0, 0), "valid"):
            raise UnsupportedOperation(f"masked_forward: {op.name} must pad with zeros, got {conv}")
        step.kind = CONVOLUTION
        step.kernel = _pair(conv.kernel_size)
        step.stride = _pair(conv.stride)
        step.groups = conv.groups
        if conv.padding == "same":
            if any(size % 2 == 0 for size in conv.kernel_size):
                raise UnsupportedOperation(
                    f"masked_forward: {op.name} must have an odd kernel to pad 'same', got {conv}"
                )
            step.padding = (step.kernel[0] // 2, step.kernel[1] // 2)
        elif not isinstance(conv.padding, str):
            step.padding = _pair(conv.padding)
        step.weight = self._double(conv.weight)
        step.bias = None if conv.bias is None else self._double(conv.bias)

    def _open_linear(self, step: Step, index: int, op: Op) -> None:
        channels, height, width = self.shapes[self._copy(index, 0)[0]]
        if len(self.trace.shapes[op.inputs[0]]) > 1:  # of every token or pixel
            height = width = 1
        weight, bias = op.weights(self.model)
        if weight.shape[1:] != (channels * height * width,):
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must be a Linear over all features, got a weight of "
                f"{tuple(weight.shape)}"
            )
        step.kind = CONVOLUTION
        step.kernel = (height, width)
        step.weight = self._double(weight).view(-1, channels, height, width)
        step.bias = None if bias is None else self._double(bias)

    def _open_pool(self, step: Step, index: int, op: Op) -> None:
        step.kind = MAX_POOL if op.kind == "maxpool" else AVERAGE_POOL
        if op.kind == "globalpool":
            step.kernel = self.shapes[self._copy(index, 0)[0]][1:]
            return
        step.kernel = _pair(op.attrs["kernel"])
        step.stride = _pair(op.attrs["stride"])
        step.padding = _pair(op.attrs["padding"])
        step.count_include_pad = bool(op.attrs.get("count_include_pad", True))
        step.ceil_mode = bool(op.attrs["ceil_mode"])

    def _open_subsample(self, step: Step, op: Op) -> None:
        """A strided 1x1 convolution that moves channel i to ``positions[i]``."""
        step.kind = CONVOLUTION
        step.stride = _pair(op.attrs["stride"])
        positions = torch.as_tensor(op.attrs["positions"], dtype=torch.int64)
        weight = torch.zeros(step.channels, len(positions), 1, 1, dtype=torch.float64)
        weight[positions, torch.arange(len(positions))] = 1
        step.weight = weight.to(self.device)

    def _open_select(self, step: Step, index: int, op: Op) -> None:
        """A 1x1 convolution that moves channel ``channels[i]`` to i."""
        step.kind = CONVOLUTION
        channels = torch.as_tensor(op.attrs["channels"])
        before = self.shapes[self._copy(index, 0)[0]][0]
        weight = torch.zeros(len(channels), before, 1, 1, dtype=torch.float64)
        weight[torch.arange(len(channels)), channels] = 1
        step.weight = weight.to(self.device)

    def _open_concatenation(self, step: Step, index: int, op: Op) -> None:
        step.kind = CONCATENATION
        step.others = tuple(self._buffer(index, position) for position in range(1, len(op.inputs)))
        sizes = {self.buffers[buffer][1:] for buffer in step.operands}
        if len(sizes) > 1:
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must concatenate maps of one size, got {sorted(sizes)}"
            )

    def _open_product(self, step: Step, index: int, op: Op) -> None:
        step.kind = PRODUCT
        step.others = (self._buffer(index, 1),)
        (channels, *size), (others, *other) = (self.buffers[buffer] for buffer in step.operands)
        if channels != others or other not in (size, [1, 1]):
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must multiply maps of one shape, or one by a number a "
                f"channel, got {[channels, *size]} and {[others, *other]}"
            )

    def _open_pick(self, step: Step, index: int, op: Op) -> None:
        """Some positions; tokens of the model's own are zeros with a constant added."""
        step.kind = PICK
        if op.kind == "pick":
            step.index = tuple(op.attrs["positions"].flatten().tolist())
            return
        tokens = self.shapes[index][1]
        given = self.trace.shapes[op.inputs[0]][1]
        own = tokens - given
        first = own if op.attrs["front"] else 0  # where the given ones begin
        step.index = tuple(
            at - first if first <= at < first + given else -1 for at in range(tokens)
        )
        values = torch.zeros(self.shapes[index], dtype=torch.float64, device=self.device)
        begin = 0 if op.attrs["front"] else given
        values[:, begin : begin + own, 0] = self._parameter(op)
        step.absorb_residual(self._constant(values))

    def _open_norm(self, step: Step, op: Op) -> None:
        step.kind = LAYER_NORM
        step.value = float(op.attrs["eps"])
        if op.module is None:
            return
        norm = self.modules[op.module]
        assert isinstance(norm, nn.LayerNorm | nn.GroupNorm | nn.InstanceNorm2d)
        ones = torch.ones(step.channels, dtype=torch.float64, device=self.device)
        scale = ones if norm.weight is None else self._double(norm.weight)
        shift = 0 * ones if norm.bias is None else self._double(norm.bias)
        step.absorb_affine(scale, shift, NONE)

    def _open_attention(self, step: Step, index: int, op: Op) -> None:
        step.kind = ATTENTION
        step.others = (self._buffer(index, 1), self._buffer(index, 2))
        heads = [torch.as_tensor(op.attrs[name]) for name in ("q", "k", "v")]
        if len({one.shape for one in heads}) > 1:
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must have heads of one size, got "
                f"{[tuple(one.shape) for one in heads]}"
            )
        read = torch.stack(heads)
        step.index = tuple(read.flatten().tolist())
        step.heads, size = read.shape[1:]
        scale = op.attrs["scale"]
        step.value = size**-0.5 if scale is None else float(scale)

    def _by_pixel(self, op: Op) -> bool:
        """Whether all inputs have their channels apart from their positions."""
        found = (self.trace.shapes[value][0] for value in op.inputs)
        return all(
            channels == self.shapes[value][0]
            for channels, value in zip(found, op.inputs, strict=True)
        )

    # ---- filling its epilogue

    def _extend(self, step: Step, value: int) -> tuple[Step, int]:
        """Absorb the elementwise operations behind ``value``: the step and the value it ends at."""
        while True:
            readers = sorted({reader for reader, _ in self.readers[value]})
            following = next((r for r in readers if self._continue(step, value, r)), None)
            if following is None:
                return step, value
            self.absorbed.add(following)
            value = following

    def _continue(self, step: Step, value: int, reader: int) -> bool:
        """Absorb ``reader``, writing ``value`` to ``plain`` if others read it too."""
        op = self.trace.ops[reader]
        if op.kind not in _ELEMENTWISE or self._wanted(value, but=reader) - {None}:
            return False
        edges = [edge for edge in self.readers[value] if edge[0] == reader]
        if len(edges) > 1 or self._copy(*edges[0])[1] is not None:
            return False
        if not self._wanted(value, but=reader):
            return self._absorb(step, reader, value)
        stage = step.stage
        if stage > PLAIN or step.plain != NONE:
            return False
        step.stage = PLAIN
        if not self._absorb(step, reader, value):
            step.stage = stage
            return False
        step.plain = self._new_buffer((value, None))
        return True

    def _absorb(self, step: Step, index: int, value: int) -> bool:
        """Absorb elementwise operation ``index``, whose other operand than ``value`` (for a sum)
        must lie in a buffer already. ``value == index`` absorbs it behind a copy of input 0."""
        op = self.trace.ops[index]
        if op.kind in ACTIVATIONS:
            return step.absorb_activation(ACTIVATIONS[op.kind])
        if op.kind == "gelu":
            return step.absorb_activation(GELU[op.attrs["approximate"]])
        if op.kind == "parameter":
            return self._absorb_parameter(step, index, op)
        if op.kind == "add":
            one, two = (self.shapes[read] for read in op.inputs)
            if one != two:
                raise UnsupportedOperation(
                    f"masked_forward: {op.name} must add maps of one shape, got {one} and {two}"
                )
            copies = [self._copy(index, position) for position in (0, 1)]
            other = copies[0] if copies[1] == (value, None) else copies[1]
            return other in self.buffer_of and step.absorb_residual(self.buffer_of[other])
        return step.absorb_affine(*self._affine(index, op), index if op.kind == "norm" else NONE)

    def _absorb_parameter(self, step: Step, index: int, op: Op) -> bool:
        """A tensor of the model: by channel it is an affine, for every position a residual."""
        values, how = self._parameter(op), op.attrs["how"]
        shape = self.shapes[index]
        if values.shape == shape[:1]:
            ones = torch.ones_like(values)
            scale = {"mul": values, "div": 1 / values}.get(how, ones)
            shift = {"add": values, "sub": -values}.get(how, 0 * ones)
            return step.absorb_affine(scale, shift, NONE)
        values = values[..., None] if values.ndim == 2 else values
        if how not in ("add", "sub") or values.shape != shape:
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must add a value for each of {shape}, or scale the "
                f"channels, got {how} of {tuple(values.shape)}"
            )
        if step.stage >= RESIDUAL:
            return False
        return step.absorb_residual(self._constant(values if how == "add" else -values))

    def _constant(self, values: Tensor) -> int:
        """A buffer of values [C, H, W] that no step writes."""
        channels, height, width = values.shape
        self.buffers.append((channels, height, width))
        self.constants[len(self.buffers) - 1] = values
        return len(self.buffers) - 1

    def _parameter(self, op: Op) -> Tensor:
        """The elements of the model's tensor that an operation takes, float64."""
        owner, _, leaf = op.attrs["name"].rpartition(".")  # perhaps no parameter, nor a buffer
        tensor = self._double(getattr(self.model.get_submodule(owner), leaf)).flatten()
        return tensor[torch.as_tensor(op.attrs["index"]).to(self.device)]

    def _double(self, values: Tensor) -> Tensor:
        return values.detach().to(self.device, torch.float64)

    def _affine(self, index: int, op: Op) -> tuple[Tensor, Tensor]:
        """Scale and shift float64 ``[C]`` of a norm or affine."""
        channels = self.shapes[index][0]
        if op.kind == "affine":
            scale, shift = self._double(op.attrs["scale"]), self._double(op.attrs["shift"])
        else:
            norm = self.modules[op.module or ""]
            if (
                not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
                or norm.running_mean is None
                or norm.running_var is None
            ):
                raise UnsupportedOperation(
                    f"masked_forward: {op.name} must be a BatchNorm with statistics, got {norm}"
                )
            scale = (self._double(norm.running_var) + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * self._double(norm.weight)
            shift = -self._double(norm.running_mean) * scale
            if norm.bias is not None:
                shift = shift + self._double(norm.bias)
        if scale.shape != (channels,) or shift.shape != (channels,):
            raise UnsupportedOperation(
                f"masked_forward: {op.name} must have one scale and shift for each of the "
                f"{channels} channels, got {tuple(scale.shape)}"
            )
        return scale, shift

    # ---- closing it

    def _finish(self, step: Step, value: int) -> None:
        """Write the copies of ``value`` that are read, with steps of their own if need be."""
        wanted = self._wanted(value)
        layers = sorted(layer for layer in wanted if layer is not None)
        if None in wanted or len(layers) > 1:
            if layers and step.stage <= PLAIN and step.plain == NONE:
                step.plain = self._new_buffer((value, None))
                self._mask(step, value, layers.pop(0))
            else:
                step.final = self._new_buffer((value, None))
        else:
            self._mask(step, value, layers.pop())
        self.steps.append(step)
        for layer in layers:
            self._emit_copy(value, layer)

    def _emit_copy(self, value: int, layer: int | None) -> None:
        name = self.trace.ops[value].name
        step = Step(name, MAX_POOL, self.buffer_of[value, None], self.shapes[value][0])
        self._mask(step, value, layer)
        self.steps.append(step)

    def _mask(self, step: Step, value: int, layer: int | None) -> None:
        assert layer is not None
        site = self.trace.layers[layer]
        if site.channels != step.channels:
            raise UnsupportedOperation(
                f"masked_forward: {site.name} must have one site for each of the "
                f"{step.channels} channels, got {site.channels}"
            )
        step.site_start = site.start
        step.final = self._new_buffer((value, layer))


def _pair(values: int | Sequence[int]) -> Pair:
    first, second = (values, values) if isinstance(values, int) else values
    return int(first), int(second)
