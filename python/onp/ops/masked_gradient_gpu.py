"""Masked gradient on a GPU: the same plan as the native engine's, run by Triton kernels and cuDNN.

The forward pass is the masked forward's and keeps what the backward pass reads. Backwards
every step is two things: its epilogue taken back, and the gradient by its operation's input. Where
our convolution is the last to add to a gradient, what is before it is taken back in its epilogue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.backends import cudnn

from onp.errors import UnsupportedOperation
from onp.ops._gpu_program import (
    Concatenation,
    Convolution,
    GpuProgram,
    Layer,
    Operation,
    on_device,
)
from onp.ops._masked_forward_lowering import Lowering
from onp.ops._masked_forward_steps import CONVOLUTION, NONE, Program
from onp.ops._validate import check_gates, check_images
from onp.ops.masked_gradient import Norm, norms_of, pull_of_moments

if TYPE_CHECKING:
    from onp.suspect.trace import Trace

Outputs = tuple[Tensor, Tensor, Tensor]
"""Logits, mean and variance; the last two are empty where no moments are asked for."""


@dataclass
class _Kept:
    """What a step's backward pass reads of its forward pass, float32 [I, H, W, C] each."""

    active: Tensor | None = None
    passed: Tensor | None = None
    result: Tensor | None = None
    scaled: Tensor | None = None


@dataclass
class _Pass:
    """A forward pass over images, padded to a multiple of the kernels' alignment."""

    count: int
    """Images."""
    per_mask: int
    gates: Tensor | None
    """float32 [B, S + align]."""
    each: bool
    """Whether gradients by gates are wanted of each image."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """By buffer."""
    kept: list[_Kept] = field(default_factory=list)
    """Of each step."""


class GpuMaskedGradientPlan:
    """A network prepared for gradients on one device: a function of images and gates that is
    differentiable once."""

    def __init__(
        self,
        program: Program,
        norms: dict[int, Norm],
        image_shape: tuple[int, ...],
        sites: int,
        num_classes: int,
        device: torch.device,
        precision: Literal["fp32", "tf32"],
    ) -> None:
        self.image_shape = image_shape
        """(C, H, W) of the images."""
        self.sites = sites
        """S, the number of gates."""
        self.num_classes = num_classes
        """K, the width of the logits."""
        self.device = device = torch.empty(0, device=device).device  # with its number
        self.units = sum(norm.width for norm in norms.values())
        """U, the channels of all batch norms."""
        found = {index for pair in program.norms for index in pair}
        self.tells_moments = found >= norms.keys()
        """Whether the plan sees every norm's output."""
        self._program = program
        self._norms = norms
        for step in program.steps:  # an activation's derivative is read from its result
            if step.first and step.plain == NONE and (step.scale is not None or step.second):
                step.plain = len(program.buffers)
                program.buffers.append(program.buffers[step.final])
        self._exact = precision == "fp32"
        self._network = GpuProgram(program, device, precision)
        self._back = [self._turned(layer) for layer in self._network.layers]
        self._pixels = torch.ones(self.units, device=device)
        for norm in norms.values():
            self._pixels[norm.units] = norm.pixels

    def __call__(self, images: Tensor, gates: Tensor | None = None) -> Tensor:
        """Logits float32 ``[N, K]`` of images float32 ``[N, C, H, W]`` and gates float32 ``[S]`` or
        ``[N, S]``, on the plan's device.

        Raises ValueError: an argument has the wrong type, shape or device.
        """
        self._validate(images, gates)
        return self._outputs(images, gates, moments=False)[0]

    def with_moments(self, images: Tensor, gates: Tensor | None = None) -> Outputs:
        """Logits float32 ``[N, K]``, and mean and variance float32 ``[N, U]`` over the pixels of
        every batch norm's output, before activation and residual sum.

        Arguments and errors are those of a call. Raises UnsupportedOperation unless
        ``tells_moments``.
        """
        if not self.tells_moments:
            raise UnsupportedOperation("masked_gradient: a norm's output is not computed by itself")
        self._validate(images, gates)
        return self._outputs(images, gates, moments=True)

    def _outputs(self, images: Tensor, gates: Tensor | None, *, moments: bool) -> Outputs:
        differentiable = images.requires_grad or (gates is not None and gates.requires_grad)
        if torch.is_grad_enabled() and differentiable:
            outputs: Outputs = _Gradient.apply(images, gates, self, moments)  # type: ignore[no-untyped-call]
            return outputs
        with torch.no_grad(), _on(self):
            return self.forward(images, gates, moments=moments, keep=False)[0]

    def accepts(self, images: Tensor, gates: Tensor | None = None) -> bool:
        """Whether a call with these arguments would be valid."""
        try:
            self._validate(images, gates)
        except ValueError:
            return False
        return True

    def _validate(self, images: Tensor, gates: Tensor | None) -> None:
        check_images("masked_gradient", images, self.image_shape)
        check_gates("masked_gradient", gates, len(images), self.sites)
        for name, tensor in (("images", images), ("gates", gates)):
            if tensor is not None and tensor.device != self.device:
                raise ValueError(
                    f"masked_gradient: {name} must be on {self.device}, got {tensor.device}"
                )

    # ---- forward

    def forward(
        self, images: Tensor, gates: Tensor | None, *, moments: bool, keep: bool
    ) -> tuple[Outputs, _Pass]:
        """The outputs, and what the backward pass reads if there will be one (``keep``)."""
        network, align = self._network, self._network.align
        count = len(images)
        padded = F.pad(images, (0,) * 7 + (-count % align,)) if count % align else images
        rows, per_mask, each = None, len(padded), gates is not None and gates.ndim == 2
        if gates is not None and each and gates.stride(0) != 0:
            rows, per_mask = F.pad(gates, (0, align, 0, len(padded) - count)), 1
        elif gates is not None:  # one row for all: what is expanded is read once
            rows = F.pad((gates[:1] if each else gates[None]), (0, align))
        run = _Pass(count, per_mask, rows, each, {0: network.pixels(padded)})
        mean = torch.empty(count, self.units if moments else 0, device=self.device)
        variance = torch.empty_like(mean)
        for layer, (result, scaled), dead in zip(
            network.layers, self._program.norms, network.dead, strict=True
        ):
            kept = self._kept(layer, run, moments=moments, keep=keep)
            for norm, values in ((result, kept.result), (scaled, kept.scaled)):
                if values is not None:  # moments are asked for, and there is a norm
                    units = self._norms[norm].units
                    part = values[:count, :, :, : self._norms[norm].width]
                    spread, middle = torch.var_mean(part, (1, 2), correction=0)
                    mean[:, units], variance[:, units] = middle, spread
            if keep:
                run.kept.append(kept)
            else:
                for buffer in dead:
                    del run.values[buffer]
        logits = run.values[self._program.output].flatten(1)[:count, : self.num_classes]
        return (logits.clone(), mean, variance), run

    def _kept(self, layer: Layer, run: _Pass, *, moments: bool, keep: bool) -> _Kept:
        """Run a layer, and what of it the backward pass reads."""
        step, network = layer.step, self._network
        images = len(run.values[step.input])
        gated = run.gates is not None and step.site_start != NONE

        def room(wanted: bool) -> Tensor | None:
            _, height, width = self._program.buffers[step.final]
            shape = (images, height, width, network.width(step.final))
            return torch.empty(shape, device=self.device) if wanted else None

        result = room(moments and step.result_norm >= 0)
        scaled = room(moments and step.scaled_norm >= 0)
        active = room(gated and keep)
        network.run(
            layer, run.values, run.gates, run.per_mask,
            result=result, scaled=scaled, active=active,
        )  # fmt: skip
        final = run.values[step.final]
        active = final if active is None else active
        passed = run.values[step.plain] if step.plain != NONE else active
        return _Kept(active, passed, result, scaled)

    # ---- backward

    def backward(
        self,
        run: _Pass,
        logits: Tensor,
        slope: Tensor | None,
        offset: Tensor | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients by images and by gates, of those float32 by the logits [N, K] and by each value
        x of a norm's output, x * slope + offset, [N, U]."""
        network, program, count = self._network, self._program, run.count
        images = len(run.values[0])
        # What flows to each buffer: gradients, and convolutions that are still to run.
        flows: dict[int, list[_Flow]] = {}
        pulled = torch.zeros(images, 1, 1, network.width(program.output), device=self.device)
        pulled[:count, 0, 0, : self.num_classes] = logits
        flows[program.output] = [_Flow(pulled)]
        if slope is not None and offset is not None:
            slope, offset = (F.pad(x, (0, 0, 0, images - count)) for x in (slope, offset))
        gates_grad = None
        if wanted[1] and run.gates is not None:
            gates_grad = torch.zeros(images, self.sites, device=self.device)
        for number in range(len(network.layers) - 1, -1, -1):
            layer, kept = network.layers[number], run.kept[number]
            step = layer.step
            to_final, to_plain = flows.pop(step.final, []), flows.pop(step.plain, [])
            if not to_final and not to_plain and slope is None:
                continue
            reverse = self._reverse(layer, kept, run, slope, offset, gates_grad)
            last = next((one for one in to_final if one.convolution is not None), None)
            others = [one.gradient() for one in to_final if one is not last]
            if last is None:
                first = others.pop() if others else torch.zeros_like(reverse.out)
            reverse = reverse.with_flows(_sum(others), _sum([one.gradient() for one in to_plain]))
            if last is None:
                self._kernels.launch_back(first.contiguous(), reverse)
            else:
                self._kernels.launch_convolution_back(last.value, last.convolution, reverse)
            if reverse.ungated is not None and gates_grad is not None and kept.active is not None:
                self._kernels.launch_gate_gradient(
                    kept.active, reverse.ungated, gates_grad, step.site_start, step.channels
                )
            if step.residual != NONE:
                flow = reverse.out if reverse.flow is None else reverse.flow
                flows.setdefault(step.residual, []).append(_Flow(flow))
            if not wanted[0] and set(step.operands) == {0}:
                continue
            for buffer, flow in self._by_operands(number, reverse.out, run):
                flows.setdefault(buffer, []).append(flow)
        found = None
        if wanted[0]:
            summed = _sum([one.gradient() for one in flows.get(0, [])])
            channels = self.image_shape[0]
            found = torch.zeros(count, *self.image_shape, device=self.device)
            if summed is not None:
                found = summed[:count, :, :, :channels].permute(0, 3, 1, 2).contiguous()
        if gates_grad is not None:
            gates_grad = gates_grad[:count]
            gates_grad = gates_grad if run.each else gates_grad.sum(0)
        return found, gates_grad

    @property
    def _kernels(self) -> Any:
        from onp.ops import masked_gradient_triton  # like the masked forward's, when it is needed

        return masked_gradient_triton

    def _reverse(
        self,
        layer: Layer,
        kept: _Kept,
        run: _Pass,
        slope: Tensor | None,
        offset: Tensor | None,
        gates_grad: Tensor | None,
    ) -> Any:
        """The epilogue of a layer to be taken back, but for what flows to it."""
        step = layer.step
        gated = run.gates is not None and step.site_start != NONE

        def moments(values: Tensor | None, norm: int) -> Any:
            if values is None or slope is None or offset is None:
                return None
            at = self._norms[norm]
            return self._kernels.Moments(values, slope, offset, at.units.start, at.width)

        _, height, width = self._program.buffers[step.final]
        shape = (len(run.values[0]), height, width, self._network.width(step.final))

        def room(wanted: bool) -> Tensor | None:
            return torch.empty(shape, device=self.device) if wanted else None

        result = moments(kept.result, step.result_norm)
        return self._kernels.Reverse(
            other=None,
            plain=None,
            second=step.second,
            active=kept.active,
            gates=run.gates if gated else None,
            site_start=max(step.site_start, 0),
            per_mask=run.per_mask,
            scaled=moments(kept.scaled, step.scaled_norm),
            scale=layer.scale,
            first=step.first,
            passed=kept.passed if step.first else None,
            result=result,
            ungated=room(gated and gates_grad is not None),
            flow=room(step.residual != NONE and result is not None),
            out=torch.empty(shape, device=self.device),
            tf32=step.kind == CONVOLUTION and not self._exact,
        )

    def _by_operands(
        self, number: int, gradient: Tensor, run: _Pass
    ) -> Iterator[tuple[int, _Flow]]:
        """The gradient by each buffer that a step's operation reads."""
        step, back = self._program.steps[number], self._back[number]
        values = [run.values[buffer] for buffer in step.operands]
        if isinstance(back, Concatenation):
            flows = [_Flow(one) for one in back.backward(gradient, values)]
        elif isinstance(back, Operation):
            flows = [_Flow(back.backward(gradient, values[0]))]
        else:
            flows = [_Flow(gradient, back, self._kernels, self._network.width(step.input))]
        return zip(step.operands, flows, strict=True)

    def _turned(self, layer: Layer) -> Any:
        """What gives the gradient by a layer's input: its operation, or for our convolution another
        of ours with the transposed kernel, or cuDNN where it has a stride."""
        if layer.operation is not None:
            return layer.operation
        step = layer.step
        assert step.weight is not None
        given, made = (self._program.buffers[one] for one in (step.input, step.final))
        stored_in, stored = (self._network.width(one) for one in (step.input, step.final))
        weight = step.weight.to(self.device, torch.float32)
        weight = F.pad(weight, (0, 0, 0, 0, 0, stored_in - given[0], 0, stored - made[0]))
        if step.stride == (1, 1):
            turned = weight.flip(2, 3).transpose(0, 1)
            ours = self._network.kernels.prepare(
                turned, 1, *given[1:], torch.float32, residual=True, exact=self._exact, lean=True
            )
            if ours is not None:
                return ours
        weight = weight.contiguous(memory_format=torch.channels_last)
        return Convolution(weight, stored_in, step.stride, step.padding, 1)


@dataclass(frozen=True)
class _Flow:
    """A gradient by a buffer, or the one that a convolution of it will give."""

    value: Tensor
    convolution: Any = None
    kernels: Any = None
    width: int = 0

    def gradient(self) -> Tensor:
        """As maps [I, H, W, C]."""
        if self.convolution is None:
            return self.value
        out = self.value.new_empty(*self.value.shape[:3], self.width)
        self.kernels.launch_convolution_back(
            self.value, self.convolution, self.kernels.Reverse.nothing(out)
        )
        return out


def _sum(parts: list[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    return None if total is None else total.contiguous()


class _Gradient(torch.autograd.Function):
    """Outputs of images [N, C, H, W] and gates [S], [N, S] or None."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, gates: Tensor | None, plan: GpuMaskedGradientPlan, moments: bool
    ) -> Outputs:
        with _on(plan):
            outputs, ctx.run = plan.forward(images.detach(), gates, moments=moments, keep=True)
        ctx.plan = plan
        ctx.save_for_backward(outputs[1])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logits: Tensor | None, mean: Tensor | None, variance: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        plan: GpuMaskedGradientPlan = ctx.plan
        (means,) = ctx.saved_tensors
        if logits is None:
            logits = torch.zeros(ctx.run.count, plan.num_classes, device=plan.device)
        slope, offset = pull_of_moments(plan._pixels, means, mean, variance)
        with _on(plan):
            images, gates = plan.backward(ctx.run, logits, slope, offset, ctx.needs_input_grad[:2])
        return images, gates, None, None


def _on(plan: GpuMaskedGradientPlan) -> contextlib.ExitStack:
    """The plan's device as the current one, and its precision for what cuDNN computes."""
    stack = contextlib.ExitStack()
    stack.enter_context(cudnn.flags(enabled=True, allow_tf32=not plan._exact))
    stack.enter_context(on_device(plan.device))
    return stack


def lower(
    trace: Trace,
    model: nn.Module,
    device: torch.device | str,
    precision: Literal["fp32", "tf32"] = "tf32",
) -> GpuMaskedGradientPlan:
    """Plan gradients of ``model`` (eval mode, any floating type), traced as ``trace``.

    Weights are copied: later changes of the model do not reach the plan.

    Raises:
        UnsupportedOperation: the plan lacks an operation of the network; the message names it.
        NotBuiltError: Triton is not installed, or cannot compile for the device.
    """
    program = Lowering(trace, model).run()
    program.check_convolutional("masked_gradient")
    return GpuMaskedGradientPlan(
        program, norms_of(trace), trace.shapes[0], trace.sites, trace.num_classes,
        torch.device(device), precision,
    )  # fmt: skip
