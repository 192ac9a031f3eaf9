"""Masked forward on a GPU: the same plan as the native engine's, run by Triton kernels and cuDNN.

Masks times images are one large batch, images of a mask side by side. Convolutions of 1x1 and 3x3
on maps with sides of powers of 2 run in our kernel with all that is behind them; the others, pools
and linear layers are torch's, followed by one kernel. Nothing comes back to the host.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import NotBuiltError, ResourceError
from onp.ops._masked_forward_lowering import Lowering
from onp.ops._masked_forward_steps import CONVOLUTION, MAX_POOL, NONE, Program, Step
from onp.ops._validate import check_images

if TYPE_CHECKING:
    from onp.suspect.trace import Trace

log = logging.getLogger("onp")

Precision = Literal["fp32", "tf32", "bf16"]
"""What convolutions multiply; sums, epilogues and the last layer are fp32 in all."""
MAX_BYTES = 6 << 30
"""Of activations at once."""
REPLAYED_FROM = 6
"""Calls of one shape after which they are replayed from a CUDA graph, which costs several calls."""
MOST_GRAPHS = 8
"""Shapes of calls that are remembered."""


def triton_kernels() -> ModuleType:
    """The Triton kernels, imported when a plan needs them."""
    try:
        from onp.ops import masked_forward_triton
    except ModuleNotFoundError as error:
        raise NotBuiltError(
            "masked_forward: Triton is not installed: install the extra 'gpu' of onp"
        ) from error
    return masked_forward_triton


class GpuMaskedForwardPlan:
    """A network prepared for masked forwards on one device, in one precision."""

    def __init__(
        self,
        program: Program,
        image_shape: tuple[int, ...],
        sites: int,
        num_classes: int,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.image_shape = image_shape
        """(C, H, W) of the images."""
        self.sites = sites
        self.num_classes = num_classes
        self.device = device
        self.precision = precision
        self.max_bytes = MAX_BYTES
        self._kernels = triton_kernels()
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        """Shared by all graphs: they run one after the other, and what they give is copied."""
        with self._current():
            self._try_kernels()
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._program = program
        self._stages = [self._stage(step) for step in program.steps]
        self._graphs: OrderedDict[tuple[int, int], _Graph | int] = OrderedDict()
        """By masks and images of a call; or how often it came, not captured yet."""

    def run(self, pruned: Tensor, images: Tensor) -> Tensor:
        """Logits float32 ``[B, N, K]`` on the plan's device of masks bool ``[B, S]`` on images
        float32 ``[N, C, H, W]``, both from any device.

        Raises:
            ValueError: an argument has the wrong type or shape.
            ResourceError: the device has no room for the fewest images.
        """
        self._validate(pruned, images)
        while True:
            try:
                with self._current():
                    return self._run(pruned, images.detach())
            except torch.OutOfMemoryError as error:
                self._graphs.clear()
                torch.cuda.empty_cache()
                self.max_bytes //= 2
                if self.max_bytes < self.bytes_per_image * self._align:
                    raise ResourceError(
                        f"masked_forward: {self.device} has no room for {self._align} images"
                    ) from error
                log.warning(
                    "masked_forward: out of memory on %s: activations are kept within %d MiB now",
                    self.device, self.max_bytes >> 20,
                )  # fmt: skip

    def _current(self) -> AbstractContextManager[Any]:
        """The plan's device as the current one: that is where Triton launches."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _validate(self, pruned: Tensor, images: Tensor) -> None:
        if pruned.dtype != torch.bool or pruned.ndim != 2 or pruned.shape[1] != self.sites:
            raise ValueError(
                f"masked_forward: masks must be bool [B, {self.sites}], "
                f"got {pruned.dtype} {tuple(pruned.shape)}"
            )
        check_images("masked_forward", images, self.image_shape)

    def _run(self, pruned: Tensor, images: Tensor) -> Tensor:
        """Call by call, each of about as many images as the bound on memory allows."""
        align = self._align
        gates = torch.zeros(len(pruned), self.sites + align, device=self.device)
        gates[:, : self.sites] = (~pruned).to(self.device)
        logits = torch.empty(
            len(pruned), len(images), self.num_classes, dtype=torch.float32, device=self.device
        )
        if logits.numel() == 0:
            return logits
        if images.numel() * images.element_size() <= self.max_bytes // 8:
            images = images.to(self.device)  # else part by part, again for other masks
        most = max(self.max_bytes // self.bytes_per_image // align * align, align)
        per_mask = min(-(-len(images) // align) * align, most)
        together = max(most // per_mask, 1)
        together = -(-len(gates) // -(-len(gates) // together))  # as even as can be
        for first in range(0, len(gates), together):
            some_gates = gates[first : first + together]
            count = len(some_gates)
            if count < together:  # one shape of calls: masks that nobody asked for
                some_gates = F.pad(some_gates, (0, 0, 0, together - count))
            for start in range(0, len(images), per_mask):
                part = images[start : start + per_mask].to(self.device)
                whole = F.pad(part, (0,) * 7 + (per_mask - len(part),))
                found = self._call(some_gates, whole)[:count, : len(part)]
                logits[first : first + count, start : start + per_mask] = found
        return logits

    def _call(self, gates: Tensor, images: Tensor) -> Tensor:
        """Logits [B, N, K]; calls of a shape that came often are replayed."""
        key = (len(gates), len(images))
        graph = self._graphs.pop(key, 0)
        if isinstance(graph, int):
            graph += 1
            if self.device.type == "cuda" and graph >= REPLAYED_FROM:
                graph = _Graph.of(self._forward, gates, images, self._pool)
        self._graphs[key] = graph  # the latest last
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        if isinstance(graph, int):
            return self._forward(gates, images)
        return graph.replay(gates, images)

    @torch.no_grad()
    def _forward(self, gates: Tensor, images: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        masks, count = len(gates), len(images)
        shape = (count, height, width, self._width(0))
        pixels = torch.zeros(shape, dtype=self._dtype, device=self.device)
        pixels[..., :channels] = images.permute(0, 2, 3, 1)
        if self.precision == "tf32":
            pixels = self._kernels.rounded_to_tf32(pixels)
        values = {0: pixels.expand(masks, *shape).reshape(masks * count, *shape[1:])}
        del pixels
        exact = self.precision == "fp32"
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=not exact
        ):
            for stage, dead in zip(self._stages, self._dead, strict=True):
                stage.run(values, gates, count)
                for buffer in dead:
                    del values[buffer]
        logits = values[self._program.output]
        return logits.view(masks, count, -1)[..., : self.num_classes]

    def _try_kernels(self) -> None:
        """Raise NotBuiltError where Triton cannot compile for the device, or not at all."""
        try:
            x = torch.zeros(1, 1, 1, self._align, device=self.device)
            nothing = (None, None, 0, None, None, None, 0, None, 0, 1)
            self._kernels.launch_epilogue(x, self._kernels.Epilogue(*nothing, torch.empty_like(x)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a driver, a C compiler, or the GPU's kind is not there
            raise NotBuiltError(
                f"masked_forward: Triton cannot compile for {self.device}: "
                f"{type(error).__name__}: {error}"[:300]
            ) from error

    # ---- memory

    def _width(self, buffer: int) -> int:
        """Channels of a buffer as it is stored."""
        align: int = self._kernels.ALIGNMENT
        return -(-self._program.buffers[buffer][0] // align) * align

    @cached_property
    def _align(self) -> int:
        return int(self._kernels.ALIGNMENT)

    @cached_property
    def _dead(self) -> list[list[int]]:
        """Buffers that are read for the last time by each step, or never after it."""
        last: dict[int, int] = {}
        for number, step in enumerate(self._program.steps):
            for buffer in (step.input, step.residual, step.plain, step.final):
                last[buffer] = number
        last.pop(NONE, None)
        last.pop(self._program.output)
        steps = range(len(self._program.steps))
        return [[buffer for buffer, at in last.items() if at == number] for number in steps]

    @cached_property
    def bytes_per_image(self) -> int:
        """The most that is alive at once, an operation's own result counted."""
        size = torch.empty(0, dtype=self._dtype).element_size()

        def of(buffer: int) -> int:
            _, height, width = self._program.buffers[buffer]
            return size * self._width(buffer) * height * width

        alive, most = {0: of(0)}, of(0)
        for step, dead in zip(self._program.steps, self._dead, strict=True):
            written = [buffer for buffer in (step.plain, step.final) if buffer != NONE]
            alive |= {buffer: of(buffer) for buffer in written}
            most = max(most, sum(alive.values()) + of(step.final))
            for buffer in dead:
                del alive[buffer]
        return most

    # ---- stages

    def _stage(self, step: Step) -> _Stage:
        channels, height, width = self._program.buffers[step.final]
        stored = self._width(step.final)

        def prepared(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return F.pad(values.to(self.device, torch.float32), (0, stored - channels))

        def make(values: dict[int, Tensor], gates: Tensor, per_mask: int) -> Any:
            """The epilogue of a call, its outputs not written yet."""
            count = len(values[step.input])

            def new(buffer: int) -> Tensor:
                is_output = buffer == self._program.output
                values[buffer] = torch.empty(
                    count, height, width, stored, device=self.device,
                    dtype=torch.float32 if is_output else self._dtype,
                )  # fmt: skip
                return values[buffer]

            return self._kernels.Epilogue(
                bias=bias,
                residual=None if step.residual == NONE else values[step.residual],
                first=step.first,
                plain=None if step.plain == NONE else new(step.plain),
                scale=scale,
                shift=shift,
                second=step.second,
                gates=None if step.site_start == NONE else gates,
                site_start=max(step.site_start, 0),
                per_mask=per_mask,
                final=new(step.final),
                tf32=self.precision == "tf32" and step.final != self._program.output,
                plain_tf32=self.precision == "tf32" and step.plain in multiplied,
            )

        multiplied = {one.input for one in self._program.steps if one.kind == CONVOLUTION}
        bias, scale, shift = map(prepared, (step.bias, step.scale, step.shift))
        result = self._operation(step, channels)
        if not isinstance(result, _Convolution):
            return _Stage(step.input, make, result, self._kernels.launch_epilogue)
        return _Stage(step.input, make, None, result)

    def _operation(self, step: Step, channels: int) -> Callable[..., Any]:
        if step.kind == CONVOLUTION:
            assert step.weight is not None
            return self._convolution(step, step.weight.to(self.device, torch.float32), channels)
        if step.kernel == (1, 1) and step.stride == (1, 1):
            return lambda x: x

        def pool(x: Tensor) -> Tensor:
            x = (x.float() if step.final == self._program.output else x).permute(0, 3, 1, 2)
            if step.kind == MAX_POOL:
                out = F.max_pool2d(x, step.kernel, step.stride, step.padding)
            else:
                out = F.avg_pool2d(
                    x, step.kernel, step.stride, step.padding,
                    count_include_pad=step.count_include_pad,
                )  # fmt: skip
            return out.permute(0, 2, 3, 1).contiguous()

        return pool

    def _convolution(self, step: Step, weight: Tensor, channels: int) -> Callable[..., Any]:
        """By our kernel where it can, as a product where the kernel covers the map, or by cuDNN."""
        given = self._program.buffers[step.input]
        _, height, width = self._program.buffers[step.final]
        stored_in, stored = self._width(step.input), self._width(step.final)
        if step.groups == 1:
            weight = F.pad(weight, (0, 0, 0, 0, 0, stored_in - given[0], 0, stored - channels))
            if (height, width) == (1, 1) and step.kernel == given[1:] and step.padding == (0, 0):
                taps = weight.permute(0, 2, 3, 1).reshape(stored, -1).contiguous()
                return lambda x: F.linear(x.flatten(1).float(), taps)[:, None, None]
            fits = (
                self.precision != "fp32"
                and step.kernel in ((1, 1), (3, 3))
                and step.padding == (step.kernel[0] // 2,) * 2
                and step.stride in ((1, 1), (2, 2))
                and (height * step.stride[0], width * step.stride[1]) == given[1:]
            )
            prepared = fits and self._kernels.prepare(
                weight, step.stride[0], height, width, self._dtype,
                residual=step.residual != NONE,
            )  # fmt: skip
            if prepared:
                return _Convolution(self._kernels.launch_conv, prepared)
        groups = step.groups
        if groups == given[0] == channels:  # depthwise
            weight, groups = F.pad(weight, (0,) * 7 + (stored - channels,)), stored
        sliced = groups not in (1, stored)
        weight = weight.to(self._dtype).contiguous(memory_format=torch.channels_last)

        def convolve(x: Tensor) -> Tensor:
            x = x[..., : given[0]] if sliced else x
            out = F.conv2d(
                x.permute(0, 3, 1, 2), weight, None, step.stride, step.padding, 1, groups
            )
            return out.permute(0, 2, 3, 1).contiguous()

        return convolve


@dataclass(frozen=True)
class _Convolution:
    """Our kernel with its weights."""

    launch: Callable[..., None]
    prepared: Any

    def __call__(self, x: Tensor, epilogue: Any) -> None:
        self.launch(x, self.prepared, epilogue)


@dataclass(frozen=True)
class _Stage:
    """A step: an operation of its input, then a launch that fills the epilogue's outputs."""

    input: int
    epilogue: Callable[[dict[int, Tensor], Tensor, int], Any]
    operation: Callable[[Tensor], Tensor] | None
    launch: Callable[[Tensor, Any], None]

    def run(self, values: dict[int, Tensor], gates: Tensor, per_mask: int) -> None:
        x = values[self.input]
        if self.operation is not None:
            x = self.operation(x)
        self.launch(x, self.epilogue(values, gates, per_mask))


@dataclass(frozen=True)
class _Graph:
    """A captured call: inputs are copied to where it reads, the result from where it writes."""

    graph: torch.cuda.CUDAGraph
    gates: Tensor
    images: Tensor
    logits: Tensor

    @classmethod
    def of(
        cls, call: Callable[[Tensor, Tensor], Tensor], gates: Tensor, images: Tensor, pool: Any
    ) -> _Graph:
        gates, images = gates.clone(), images.clone()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(gates.device)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits = call(gates, images)
        return cls(graph, gates, images, logits)

    def replay(self, gates: Tensor, images: Tensor) -> Tensor:
        self.gates.copy_(gates)
        self.images.copy_(images)
        self.graph.replay()
        return self.logits.clone()


def lower(
    trace: Trace, model: nn.Module, device: torch.device | str, precision: Precision
) -> GpuMaskedForwardPlan:
    """Plan masked forwards of ``model`` (eval mode, any floating type), traced as ``trace``.

    Weights are copied: later changes of the model do not reach the plan.

    Raises:
        UnsupportedOperation: the plan lacks an operation of the network; the message names it.
        NotBuiltError: Triton is not installed, or cannot compile for the device.
    """
    program = Lowering(trace, model).run()
    program.check_convolutional("masked_forward")
    return GpuMaskedForwardPlan(
        program, trace.shapes[0], trace.sites, trace.num_classes, torch.device(device), precision
    )
