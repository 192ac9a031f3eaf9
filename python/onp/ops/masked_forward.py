"""Masked forward: plan a network once, then evaluate many masks on many images in one native call.

``lower`` makes the plan from a traced network; ``MaskedForwardPlan.run`` evaluates masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from onp import _C, masks
from onp.errors import ResourceError
from onp.ops._masked_forward_lowering import Lowering
from onp.ops._validate import check_images

if TYPE_CHECKING:
    from onp.suspect.trace import Trace

MAX_BYTES = 256 << 20

Range = tuple[int, float, list[float]]
"""Of a buffer: its number, the lowest value, and the largest absolute value of each channel."""


def instruction_sets() -> list[str]:
    """Names of the kernel sets that this processor runs, widest first."""
    return _C.instruction_sets()


def bytes_pay() -> bool:
    """Whether this processor multiplies bytes faster than floats: has VNNI."""
    return "avx512vnni" in instruction_sets()


def halves_pay() -> bool:
    """Whether it multiplies bf16 faster than floats."""
    return "avx512bf16" in instruction_sets()


class MaskedForwardPlan:
    """A network prepared for masked forwards: fp32 weights of its own, packed for the engine."""

    def __init__(
        self,
        native: _C.MaskedForwardPlan,
        image_shape: tuple[int, ...],
        sites: int,
        num_classes: int,
    ) -> None:
        self.image_shape = image_shape
        """(C, H, W) of the images."""
        self.sites = sites
        """S, the number of sites a mask speaks of."""
        self.num_classes = num_classes
        """K, the width of the logits."""
        self._native = native

    @property
    def narrow_convolutions(self) -> int:
        """How many convolutions multiply bytes, or bf16; the others, and all else, are in fp32."""
        return self._native.narrow_steps

    def measure_ranges(self, packed: Tensor, images: Tensor, *, isa: str = "auto") -> list[Range]:
        """What ``lower`` wants for a plan in 8 bits: what values reach under the masks, int64
        ``[B, words(S)]``, on the images, float32 ``[N, C, H, W]``, one after the other. Of a plan
        without ranges; ``isa`` and ValueError as of ``run``."""
        self._validate(packed, images)
        _check_isa(isa)
        packed, images = packed.contiguous(), images.detach().contiguous()
        return self._native.ranges(
            images=images.data_ptr(),
            count=len(images),
            masks=packed.data_ptr(),
            batch=len(packed),
            words=packed.shape[1],
            isa=isa,
        )

    def run(
        self,
        packed: Tensor,
        images: Tensor,
        *,
        share: bool = True,
        threads: int | None = None,
        isa: str = "auto",
        max_bytes: int = MAX_BYTES,
    ) -> Tensor:
        """Logits of every mask on every image, float32 ``[B, N, K]``.

        Args:
            packed: int64 ``[B, words(S)]`` on the CPU, see ``onp.masks``.
            images: float32 ``[N, C, H, W]`` on the CPU.
            share: run what neighbouring masks have in common once. Needs memory for every value of
                the network; without it, memory is reused as soon as a value was read.
            threads: default ``torch.get_num_threads()``.
            isa: ``"auto"`` or one of ``instruction_sets()``. Sets differ in the last bits.
            max_bytes: bound on the activations of one thread.

        For one ``isa`` the logits are the same to the last bit whatever the other options are.
        What a mask prunes is left out or multiplied by zero, whichever is faster: weights for it
        that are no numbers may or may not tell.

        Raises:
            ValueError: an argument has the wrong type, shape or device.
            ResourceError: ``max_bytes`` does not hold the activations of one image.
        """
        self._validate(packed, images)
        threads = torch.get_num_threads() if threads is None else threads
        if threads < 1:
            raise ValueError(f"masked_forward: threads must be positive, got {threads}")
        _check_isa(isa)
        needed = self._native.least_bytes(share)
        if needed > max_bytes:
            raise ResourceError(
                f"masked_forward: max_bytes must be at least {needed} with share={share}, "
                f"got {max_bytes}"
            )
        order = _execution_order(masks.unpack(packed, self.sites)) if share else None
        packed = (packed if order is None else packed[order]).contiguous()
        images = images.detach().contiguous()
        batch, count = len(packed), len(images)
        # Whatever torch's default type and device are: the engine writes floats.
        size = (batch, count, self.num_classes)
        logits = torch.empty(size, dtype=torch.float32, device="cpu")
        self._native.run(
            images=images.data_ptr(),
            count=count,
            masks=packed.data_ptr(),
            batch=batch,
            words=packed.shape[1],
            logits=logits.data_ptr(),
            share=share,
            threads=threads,
            max_bytes=max_bytes,
            isa=isa,
        )
        if order is None:
            return logits
        restored = torch.empty_like(logits)
        restored[order] = logits
        return restored

    def _validate(self, packed: Tensor, images: Tensor) -> None:
        words = masks.words(self.sites)
        if packed.dtype != torch.int64 or packed.ndim != 2 or packed.shape[1] != words:
            raise ValueError(
                f"masked_forward: packed must be int64 [B, {words}], "
                f"got {packed.dtype} {tuple(packed.shape)}"
            )
        check_images("masked_forward", images, self.image_shape)
        for name, tensor in (("packed", packed), ("images", images)):
            if tensor.device.type != "cpu":
                raise ValueError(f"masked_forward: {name} must be on the CPU, got {tensor.device}")


def _check_isa(isa: str) -> None:
    if isa not in ("auto", *instruction_sets()):
        raise ValueError(
            f"masked_forward: isa must be auto or one of {instruction_sets()}, got {isa!r}"
        )


def _execution_order(pruned: Tensor) -> Tensor:
    """Order of masks bool ``[B, S]`` that puts those next to each other that agree longest, sites
    taken in execution order: int64 ``[B]``."""
    digits = np.packbits(pruned.numpy(), axis=1)
    if digits.shape[1] == 0:
        return torch.arange(len(pruned))
    return torch.from_numpy(np.lexsort(digits.T[::-1]))


def lower(
    trace: Trace, model: nn.Module, ranges: Sequence[Range] = (), *, halves: bool = False
) -> MaskedForwardPlan:
    """Plan masked forwards of ``model`` (eval mode, any floating type), traced as ``trace``.

    Weights are copied: later changes of the model do not reach the plan. With ``ranges``, of a
    plan of the same network (``measure_ranges``), convolutions read and multiply bytes where that
    is worth it: their inputs in 255 levels per channel, or 127 either way where some are negative,
    their weights in 127 levels either way per output channel; sums are exact, and everything else
    is in fp32 (M. Nagel et al., "A White Paper on Neural Network Quantization", arXiv 2106.08295,
    section 2). With ``halves``, and without ranges, they read and multiply bf16 where that is worth
    it (not where Winograd in fp32 saves more), summed in fp32.

    Raises:
        ValueError: ranges and halves.
        UnsupportedOperation: the engine lacks an operation of the network; the message names it.
    """
    if halves and ranges:
        raise ValueError("masked_forward: ranges are of 8 bits: ask for these or for halves")
    program = Lowering(trace, model).run()
    steps, constants, _arrays = program.native()
    native = _C.MaskedForwardPlan(
        program.buffers,
        steps,
        constants,
        program.output,
        trace.sites,
        list(ranges),
        halves,
    )
    return MaskedForwardPlan(native, trace.shapes[0], trace.sites, trace.num_classes)
