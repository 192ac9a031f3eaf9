"""Masked gradient: a network with frozen weights as a differentiable function of images and gates.

``lower`` plans it once from a traced network; the plan is then called like the network. The losses
stay torch code: autograd hands the gradients of logits and moments to the native backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onp import _C
from onp.errors import UnsupportedOperation
from onp.ops._masked_forward_lowering import Lowering
from onp.ops._masked_forward_steps import Program
from onp.ops._validate import check_gates, check_images
from onp.ops.masked_forward import instruction_sets

if TYPE_CHECKING:
    from onp.suspect.trace import Trace

MAX_WORKSPACE = 256 << 20
"""Bytes that are kept between the passes at most, and that the process holds on to afterwards,
beside up to as much that the engine's threads work in; beyond, the backward pass runs the network
again, block by block."""


def _floats(*shape: int) -> Tensor:
    """What the engine writes to, whatever torch's default type and device are; uninitialised."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


class _Workspace:
    """Floats, not initialised. The largest one no longer used is kept for the next caller: fresh
    memory of this size costs the system more than the backward pass reads and writes in it."""

    _spare: ClassVar[list[Tensor]] = []

    def __init__(self, floats: int) -> None:
        try:
            self.floats = self._spare.pop()
        except IndexError:  # other threads may take it between a look and the grasp
            self.floats = _floats(0)
        if len(self.floats) < floats:
            self.floats = _floats(floats)

    def __del__(self) -> None:
        if all(len(other) < len(self.floats) for other in self._spare[:1]):
            self._spare[:] = [self.floats]


@dataclass(frozen=True)
class Norm:
    """A batch norm whose output's moments a plan tells."""

    units: slice
    """Its columns among the plan's U."""
    pixels: int

    @property
    def width(self) -> int:
        """Its channels."""
        return int(self.units.stop - self.units.start)


class MaskedGradientPlan:
    """A network prepared for gradients: fp32 weights of its own, packed for the engine on the first
    call."""

    def __init__(
        self,
        program: Program,
        norms: dict[int, Norm],
        image_shape: tuple[int, ...],
        sites: int,
        num_classes: int,
    ) -> None:
        self.norms = norms
        """By op index, in execution order."""
        self.image_shape = image_shape
        """(C, H, W) of the images."""
        self.sites = sites
        """S, the number of gates."""
        self.num_classes = num_classes
        """K, the width of the logits."""
        self.units = sum(norm.width for norm in norms.values())
        """U, the channels of all batch norms."""
        found = {index for pair in program.norms for index in pair}
        self.tells_moments = found >= norms.keys()
        """Whether the plan sees every norm's output."""
        self._pixels = _floats(self.units)
        for norm in norms.values():
            self._pixels[norm.units] = norm.pixels
        self._program: Program | None = program
        self._plan: _C.MaskedGradientPlan | None = None

    def __call__(
        self,
        images: Tensor,
        gates: Tensor | None = None,
        *,
        threads: int | None = None,
        isa: str = "auto",
        max_workspace: int = MAX_WORKSPACE,
    ) -> Tensor:
        """Logits float32 ``[N, K]``; differentiable once by images and gates.

        Args:
            images: float32 ``[N, C, H, W]`` on the CPU, any strides.
            gates: float32 ``[S]`` or ``[N, S]`` on the CPU: factors on the sites.
            threads: default ``torch.get_num_threads()``.
            isa: ``"auto"`` or one of ``instruction_sets()``. Sets differ in the last bits.
            max_workspace: bytes of activations that may be kept for the backward pass.

        For one ``isa`` results are the same to the last bit whatever the other options are.

        Raises:
            ValueError: an argument has the wrong type, shape or device.
        """
        return self._run(images, gates, False, threads, isa, max_workspace)[0]

    def with_moments(
        self,
        images: Tensor,
        gates: Tensor | None = None,
        *,
        threads: int | None = None,
        isa: str = "auto",
        max_workspace: int = MAX_WORKSPACE,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits float32 ``[N, K]``, and mean and variance float32 ``[N, U]`` over the pixels of
        every batch norm's output, before activation and residual sum; differentiable once.

        Arguments and errors are those of a call. Raises UnsupportedOperation unless
        ``tells_moments``.
        """
        if not self.tells_moments:
            raise UnsupportedOperation("masked_gradient: a norm's output is not computed by itself")
        logits, mean, variance = self._run(images, gates, True, threads, isa, max_workspace)
        assert mean is not None
        assert variance is not None
        return logits, mean, variance

    def accepts(self, images: Tensor, gates: Tensor | None = None) -> bool:
        """Whether a call with these arguments would be valid."""
        try:
            self._validate(images, gates)
        except ValueError:
            return False
        return True

    def _run(
        self,
        images: Tensor,
        gates: Tensor | None,
        moments: bool,
        threads: int | None,
        isa: str,
        max_workspace: int,
    ) -> Outputs:
        self._validate(images, gates)
        threads = torch.get_num_threads() if threads is None else threads
        if threads < 1:
            raise ValueError(f"masked_gradient: threads must be positive, got {threads}")
        if isa not in ("auto", *instruction_sets()):
            raise ValueError(
                f"masked_gradient: isa must be auto or one of {instruction_sets()}, got {isa!r}"
            )
        if gates is not None and gates.ndim == 1:
            gates = gates.expand(len(images), -1)
        options = _Options(self, moments, threads, isa, max_workspace)
        differentiable = images.requires_grad or (gates is not None and gates.requires_grad)
        if torch.is_grad_enabled() and differentiable:
            return _Gradient.apply(images, gates, options)  # type: ignore[no-untyped-call]
        return _Pass.of(images, gates, options, keep=False).forward()

    def _validate(self, images: Tensor, gates: Tensor | None) -> None:
        check_images("masked_gradient", images, self.image_shape)
        if images.device.type != "cpu":
            raise ValueError(f"masked_gradient: images must be on the CPU, got {images.device}")
        check_gates("masked_gradient", gates, len(images), self.sites)
        if gates is not None and gates.device.type != "cpu":
            raise ValueError(f"masked_gradient: gates must be on the CPU, got {gates.device}")

    @property
    def native(self) -> _C.MaskedGradientPlan:
        """The native plan, built on first use."""
        program = self._program  # first: another thread may build the plan and then let it go
        if self._plan is None:
            assert program is not None

            def first(norm: int) -> int:
                return self.norms[norm].units.start if self.tells_moments and norm >= 0 else -1

            norms = [(first(result), first(scaled)) for result, scaled in program.norms]
            steps, constants, _arrays = program.native()
            self._plan = _C.MaskedGradientPlan(
                program.buffers, steps, norms, constants, program.output, self.sites, self.units
            )
            self._program = None
        return self._plan


@dataclass(frozen=True)
class _Options:
    plan: MaskedGradientPlan
    moments: bool
    threads: int
    isa: str
    max_workspace: int


Outputs = tuple[Tensor, Tensor | None, Tensor | None]
"""Logits, mean and variance."""


@dataclass
class _Pass:
    """What both passes over one batch need."""

    options: _Options
    images: Tensor
    gates: Tensor | None
    workspace: _Workspace | None

    @classmethod
    def of(cls, images: Tensor, gates: Tensor | None, options: _Options, *, keep: bool) -> _Pass:
        workspace = None
        if keep:
            plan = options.plan.native
            floats = plan.workspace_floats(len(images), gates is not None, options.moments)
            if 4 * floats <= options.max_workspace:
                workspace = _Workspace(floats)
        return cls(
            options,
            images.detach().contiguous(),
            None if gates is None else gates.detach().contiguous(),
            workspace,
        )

    def forward(self) -> Outputs:
        plan, count = self.options.plan, len(self.images)
        logits = _floats(count, plan.num_classes)
        mean = _floats(count, plan.units) if self.options.moments else None
        variance = _floats(count, plan.units) if self.options.moments else None
        plan.native.forward(
            self._input(),
            logits=logits.data_ptr(),
            mean=_address(mean),
            variance=_address(variance),
        )
        return logits, mean, variance

    def backward(
        self, logits: Tensor, slope: Tensor | None, offset: Tensor | None, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        images = torch.empty_like(self.images) if wanted[0] else None
        gates = torch.empty_like(self.gates) if wanted[1] and self.gates is not None else None
        self.options.plan.native.backward(
            self._input(),
            logits=logits.data_ptr(),
            slope=_address(slope),
            offset=_address(offset),
            images=_address(images),
            gates=_address(gates),
        )
        return images, gates

    def _input(self) -> _C.MaskedGradientInput:
        return _C.MaskedGradientInput(
            images=self.images.data_ptr(),
            count=len(self.images),
            gates=_address(self.gates),
            workspace=0 if self.workspace is None else self.workspace.floats.data_ptr(),
            moments=self.options.moments,
            threads=self.options.threads,
            isa=self.options.isa,
        )


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


class _Gradient(torch.autograd.Function):
    """Outputs of images [N, C, H, W] and gates [N, S] or None."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, gates: Tensor | None, options: _Options) -> Outputs:
        batch = _Pass.of(images, gates, options, keep=True)
        logits, mean, variance = batch.forward()
        ctx.set_materialize_grads(False)
        ctx.batch = batch  # must not hold an output: the circle would keep the workspace
        ctx.save_for_backward(images, gates, mean)  # torch refuses what was changed since
        return logits, mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logits: Tensor | None, mean: Tensor | None, variance: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        batch: _Pass = ctx.batch
        plan = batch.options.plan
        if logits is None:
            logits = _floats(len(batch.images), plan.num_classes).zero_()
        _, _, means = ctx.saved_tensors
        slope, offset = pull_of_moments(plan._pixels, means, mean, variance)
        images, gates = batch.backward(logits.contiguous(), slope, offset, ctx.needs_input_grad[:2])
        return images, gates, None


def pull_of_moments(
    pixels: Tensor, at: Tensor | None, mean: Tensor | None, variance: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient by each value x of a norm's output, of those by the moments [N, U], is
    x * slope + offset; ``at``: the means themselves."""
    if at is None or (mean is None and variance is None):
        return None, None
    slope, offset = torch.zeros_like(at), torch.zeros_like(at)
    if variance is not None:
        slope = 2 * variance / pixels
        offset = -slope * at
    if mean is not None:
        offset = offset + mean / pixels
    return slope.contiguous(), offset.contiguous()


def norms_of(trace: Trace) -> dict[int, Norm]:
    """The batch norms of a network, by op index in execution order."""
    norms: dict[int, Norm] = {}
    start = 0
    for index, (op, shape) in enumerate(zip(trace.ops, trace.shapes, strict=True)):
        if op.kind == "norm":
            norms[index] = Norm(slice(start, start + shape[0]), math.prod(shape[1:]))
            start += shape[0]
    return norms


def lower(trace: Trace, model: nn.Module) -> MaskedGradientPlan:
    """Plan gradients of ``model`` (eval mode, any floating type), traced as ``trace``.

    Weights are copied: later changes of the model do not reach the plan.

    Raises:
        UnsupportedOperation: the engine lacks an operation of the network; the message names it.
    """
    program = Lowering(trace, model).run()
    norms = norms_of(trace)
    return MaskedGradientPlan(program, norms, trace.shapes[0], trace.sites, trace.num_classes)
