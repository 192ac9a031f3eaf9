"""Masked forward on a GPU: the same plan as the native engine's, run by Triton kernels and cuDNN.

Masks times images are one large batch, images of a mask side by side. Nothing comes back to the
host. ``_gpu_program`` has the steps.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import ResourceError
from onp.ops._gpu_program import GpuProgram, Precision, captured, on_device
from onp.ops._masked_forward_lowering import Lowering
from onp.ops._masked_forward_steps import NONE, Program
from onp.ops._validate import check_images

if TYPE_CHECKING:
    from onp.suspect.trace import Trace

log = logging.getLogger("onp")

MAX_BYTES = 6 << 30
"""Of activations at once."""
REPLAYED_FROM = 6
"""Calls of one shape after which they are replayed from a CUDA graph, which costs several calls."""
MOST_GRAPHS = 8
"""Shapes of calls that are remembered."""


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
        self._network = GpuProgram(program, device, precision)
        self._align = self._network.align
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        """Shared by all graphs: they run one after the other, and what they give is copied."""
        self._program = program
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
                with on_device(self.device):
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
        masks, count = len(gates), len(images)
        pixels = self._network.pixels(images)
        shape = pixels.shape[1:]
        values = {0: pixels.expand(masks, count, *shape).reshape(masks * count, *shape)}
        del pixels
        exact = self.precision == "fp32"
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=not exact
        ):
            for layer, dead in zip(self._network.layers, self._network.dead, strict=True):
                self._network.run(layer, values, gates, count)
                for buffer in dead:
                    del values[buffer]
        logits = values[self._program.output]
        return logits.view(masks, count, -1)[..., : self.num_classes]

    # ---- memory

    @cached_property
    def bytes_per_image(self) -> int:
        """The most that is alive at once, an operation's own result counted."""
        size = self._network.dtype.itemsize

        def of(buffer: int) -> int:
            _, height, width = self._program.buffers[buffer]
            return size * self._network.width(buffer) * height * width

        alive, most = {0: of(0)}, of(0)
        for step, dead in zip(self._program.steps, self._network.dead, strict=True):
            written = [buffer for buffer in (step.plain, step.final) if buffer != NONE]
            alive |= {buffer: of(buffer) for buffer in written}
            most = max(most, sum(alive.values()) + of(step.final))
            for buffer in dead:
                del alive[buffer]
        return most


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
        stream = torch.cuda.Stream(gates.device)
        graph, logits = captured(lambda: call(gates, images), stream, pool)
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
