"""A program on a GPU: its weights there, and its steps as launches. What the masked forward and
the masked gradient share.

Maps are [I, H, W, C], channels padded with zeros to a multiple of the kernels' alignment.
Convolutions of 1x1 and 3x3 on maps with sides of powers of 2 run in our kernel with all that is
behind them; the others, pools and linear layers are torch's, followed by one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.errors import NotBuiltError
from onp.ops._masked_forward_steps import (
    CONCATENATION,
    CONVOLUTION,
    MAX_POOL,
    NONE,
    Pair,
    Program,
    Step,
)

Precision = Literal["fp32", "tf32", "bf16"]
"""What convolutions multiply, fp32 by three products of TF32 in our kernel; sums, epilogues and the
last layer are fp32 in all."""
Result = TypeVar("Result")


def triton_kernels() -> ModuleType:
    """The Triton kernels, imported when a plan needs them."""
    try:
        from onp.ops import masked_forward_triton
    except ModuleNotFoundError as error:
        raise NotBuiltError(
            "masked_forward: Triton is not installed: install the extra 'gpu' of onp"
        ) from error
    return masked_forward_triton


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one: that is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def captured(
    call: Callable[[], Result], stream: torch.cuda.Stream, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of what ``call`` launches, with its memory from ``pool``, and what it gave.

    Unlike ``torch.cuda.graph`` this leaves the allocator's cache alone: emptying it makes all that
    comes afterwards ask the driver for memory again.
    """
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            result = call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


# ---- operations


@runtime_checkable
class Operation(Protocol):
    """An operation of torch's, without what is behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """Of maps [I, H, W, C], contiguous."""

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient by ``x``, as wide, of one by the result."""


class Same:
    """A copy: only what is behind it does anything."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient[..., : x.shape[3]]


@dataclass(frozen=True)
class Pool:
    """A pool; ``wide``: its result is the network's, in fp32."""

    kind: int
    kernel: Pair
    stride: Pair
    padding: Pair
    count_include_pad: bool
    ceil_mode: bool
    wide: bool

    def forward(self, x: Tensor) -> Tensor:
        x = (x.float() if self.wide else x).permute(0, 3, 1, 2)
        if self.kind == MAX_POOL:
            out = F.max_pool2d(x, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode)
        else:
            out = F.avg_pool2d(
                x, self.kernel, self.stride, self.padding,
                ceil_mode=self.ceil_mode, count_include_pad=self.count_include_pad,
            )  # fmt: skip
        return out.permute(0, 2, 3, 1).contiguous()

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor:
        given, pulled = x.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
        size = (self.kernel, self.stride, self.padding)
        if self.kind == MAX_POOL:
            _, where = torch.ops.aten.max_pool2d_with_indices(given, *size, (1, 1), self.ceil_mode)
            out = torch.ops.aten.max_pool2d_with_indices_backward(
                pulled, given, *size, (1, 1), self.ceil_mode, where
            )
        else:
            out = torch.ops.aten.avg_pool2d_backward(
                pulled, given, *size, self.ceil_mode, self.count_include_pad, None
            )
        return out.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Covering:
    """A convolution whose kernel covers the map: a product."""

    taps: Tensor
    """float32 [O, H * W * C]"""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1).float(), self.taps)[:, None, None]

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor:
        return (gradient.flatten(1) @ self.taps).view(x.shape)


@dataclass(frozen=True)
class Convolution:
    """A convolution by cuDNN."""

    weight: Tensor
    """[O, C / groups, k, k], channels last."""
    channels: int
    """Of the input that it reads."""
    stride: Pair
    padding: Pair
    groups: int

    def _maps(self, x: Tensor) -> Tensor:
        return x[..., : self.channels].permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(self._maps(x), self.weight, None, self.stride, self.padding, 1, self.groups)
        return out.permute(0, 2, 3, 1).contiguous()

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor:
        pulled = gradient[..., : len(self.weight)].permute(0, 3, 1, 2)
        found = torch.ops.aten.convolution_backward(
            pulled, self._maps(x), self.weight, None, self.stride, self.padding, (1, 1), False,
            (0, 0), self.groups, (True, False, False),
        )[0]  # fmt: skip
        idle = x.shape[3] - self.channels
        by_input: Tensor = found.permute(0, 2, 3, 1)
        return F.pad(by_input, (0, idle)) if idle else by_input


@dataclass(frozen=True)
class Concatenation:
    """Several maps as one: the only operation that reads more than one."""

    channels: tuple[int, ...]
    """Of each map, those that pad it left out."""
    width: int
    """Channels of the result as it is stored."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        kept = [x[..., :count] for x, count in zip(parts, self.channels, strict=True)]
        idle = self.width - sum(self.channels)
        return torch.cat([*kept, kept[0].new_zeros(*kept[0].shape[:3], idle)], 3)

    def backward(self, gradient: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """The gradients by each of ``parts``, as wide as they are."""
        pulled = gradient[..., : sum(self.channels)].split(self.channels, 3)
        idle = [x.shape[3] - count for x, count in zip(parts, self.channels, strict=True)]
        return [F.pad(x, (0, n)) if n else x for x, n in zip(pulled, idle, strict=True)]


# ---- the program


@dataclass(frozen=True)
class Layer:
    """A step: an operation of its input, then a launch that fills the epilogue's outputs; or both
    at once in our convolution."""

    step: Step
    operation: Operation | Concatenation | None
    """None: our convolution."""
    convolution: Any
    bias: Tensor | None
    """float32, as wide as the result is stored; as are scale and shift."""
    scale: Tensor | None
    shift: Tensor | None


class GpuProgram:
    """A program's weights on one device, in one precision."""

    def __init__(self, program: Program, device: torch.device, precision: Precision) -> None:
        self.program = program
        self.device = device
        self.precision = precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.kernels = triton_kernels()
        self.align: int = self.kernels.ALIGNMENT
        """Channels are padded to a multiple of this, and images of a mask have to be one."""
        self._multiplied = {one.input for one in program.steps if one.kind == CONVOLUTION}
        with on_device(device):
            self.try_kernels()  # before anything asks Triton of the device
            self.layers = [self._layer(step) for step in program.steps]

    def width(self, buffer: int) -> int:
        """Channels of a buffer as it is stored."""
        return -(-self.program.buffers[buffer][0] // self.align) * self.align

    @cached_property
    def dead(self) -> list[list[int]]:
        """Buffers that are read for the last time by each step, or never after it."""
        last: dict[int, int] = {}
        for number, step in enumerate(self.program.steps):
            for buffer in (*step.operands, step.residual, step.plain, step.final):
                last[buffer] = number
        last.pop(NONE, None)
        last.pop(self.program.output)
        steps = range(len(self.program.steps))
        return [[buffer for buffer, at in last.items() if at == number] for number in steps]

    def pixels(self, images: Tensor) -> Tensor:
        """Buffer 0 of images [N, C, H, W]."""
        channels, height, width = self.program.buffers[0]
        shape = (len(images), height, width, self.width(0))
        pixels = torch.zeros(shape, dtype=self.dtype, device=self.device)
        pixels[..., :channels] = images.permute(0, 2, 3, 1)
        if self.precision == "tf32":
            pixels = self.kernels.rounded_to_tf32(pixels)
        return pixels

    def new(self, buffer: int, images: int) -> Tensor:
        """Room for a buffer; the network's result is fp32."""
        _, height, width = self.program.buffers[buffer]
        dtype = torch.float32 if buffer == self.program.output else self.dtype
        shape = (images, height, width, self.width(buffer))
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(
        self,
        layer: Layer,
        values: dict[int, Tensor],
        gates: Tensor | None,
        per_mask: int,
        **kept: Tensor | None,
    ) -> None:
        """Run a layer on ``values`` by buffer, and put there what it writes. gates: float32
        [B, S + align], a row for ``per_mask`` images. kept: further outputs of the epilogue."""
        step, output = layer.step, self.program.output
        x = values[step.input]
        for buffer in (step.plain, step.final):
            if buffer != NONE:
                values[buffer] = self.new(buffer, len(x))
        tf32 = self.precision == "tf32"
        epilogue = self.kernels.Epilogue(
            bias=layer.bias,
            residual=None if step.residual == NONE else values[step.residual],
            first=step.first,
            plain=None if step.plain == NONE else values[step.plain],
            scale=layer.scale,
            shift=layer.shift,
            second=step.second,
            gates=None if step.site_start == NONE else gates,
            site_start=max(step.site_start, 0),
            per_mask=per_mask,
            final=values[step.final],
            tf32=tf32 and step.final != output,
            plain_tf32=tf32 and step.plain in self._multiplied,
            **kept,
        )
        if layer.operation is None:
            self.kernels.launch_conv(x, layer.convolution, epilogue)
        elif isinstance(layer.operation, Concatenation):
            parts = [values[buffer] for buffer in step.operands]
            self.kernels.launch_epilogue(layer.operation.forward(parts), epilogue)
        else:
            self.kernels.launch_epilogue(layer.operation.forward(x), epilogue)

    def try_kernels(self) -> None:
        """Raise NotBuiltError where Triton cannot compile for the device, or not at all."""
        try:
            x = torch.zeros(1, 1, 1, self.align, device=self.device)
            nothing = (None, None, 0, None, None, None, 0, None, 0, 1)
            self.kernels.launch_epilogue(x, self.kernels.Epilogue(*nothing, torch.empty_like(x)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a driver, a C compiler, or the GPU's kind is not there
            raise NotBuiltError(
                f"masked_forward: Triton cannot compile for {self.device}: "
                f"{type(error).__name__}: {error}"[:300]
            ) from error

    # ---- layers

    def _layer(self, step: Step) -> Layer:
        channels = self.program.buffers[step.final][0]
        stored = self.width(step.final)

        def prepared(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return F.pad(values.to(self.device, torch.float32), (0, stored - channels))

        operation, convolution = self._operation(step)
        behind = map(prepared, (step.bias, step.scale, step.shift))
        return Layer(step, operation, convolution, *behind)

    def _operation(self, step: Step) -> tuple[Operation | Concatenation | None, Any]:
        if step.kind == CONCATENATION:
            channels = tuple(self.program.buffers[buffer][0] for buffer in step.operands)
            return Concatenation(channels, self.width(step.final)), None
        if step.kind == CONVOLUTION:
            assert step.weight is not None
            return self._convolution(step, step.weight.to(self.device, torch.float32))
        if step.kernel == (1, 1) and step.stride == (1, 1):
            return Same(), None
        pool = Pool(
            step.kind, step.kernel, step.stride, step.padding, step.count_include_pad,
            step.ceil_mode, step.final == self.program.output,
        )  # fmt: skip
        return pool, None

    def _convolution(self, step: Step, weight: Tensor) -> tuple[Operation | None, Any]:
        """By our kernel where it can, as a product where the kernel covers the map, or by cuDNN."""
        given = self.program.buffers[step.input]
        channels, height, width = self.program.buffers[step.final]
        stored_in, stored = self.width(step.input), self.width(step.final)
        if step.groups == 1:
            weight = F.pad(weight, (0, 0, 0, 0, 0, stored_in - given[0], 0, stored - channels))
            if (height, width) == (1, 1) and step.kernel == given[1:] and step.padding == (0, 0):
                return Covering(weight.permute(0, 2, 3, 1).reshape(stored, -1).contiguous()), None
            if fits(step, given[1:], (height, width)):
                prepared = self.kernels.prepare(
                    weight, step.stride[0], height, width, self.dtype,
                    residual=step.residual != NONE, exact=self.precision == "fp32",
                )  # fmt: skip
                if prepared is not None:
                    return None, prepared
        groups, read = step.groups, given[0]
        if groups == given[0] == channels:  # depthwise
            weight, groups = F.pad(weight, (0,) * 7 + (stored - channels,)), stored
            read = stored
        elif groups == 1:
            read = stored_in
        weight = weight.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return Convolution(weight, read, step.stride, step.padding, groups), None


def fits(step: Step, given: Pair, made: Pair) -> bool:
    """Whether a convolution is one of those that our kernel is for, of maps of these sizes."""
    return (
        step.groups == 1
        and step.kernel in ((1, 1), (3, 3))
        and step.padding == (step.kernel[0] // 2,) * 2
        and step.stride in ((1, 1), (2, 2))
        and (made[0] * step.stride[0], made[1] * step.stride[1]) == given
    )
