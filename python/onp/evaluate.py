"""Evaluate many masks of one network: plan once, run many."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from onp import masks
from onp.config import SearchPrecision
from onp.errors import NativeError, NotBuiltError, ResourceError, UnsupportedOperation, UsageError
from onp.ledger import Ledger
from onp.ops import masked_forward, masked_forward_gpu
from onp.ops._gpu_program import Precision as GpuPrecision
from onp.ops.masked_forward_gpu import GpuMaskedForwardPlan
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import Trace

log = logging.getLogger("onp")

Backend = Literal["auto", "native", "torch"]
Precision = Literal["fp32", "int8", "tf32", "bf16"]

SEARCH_PRECISION: GpuPrecision = "tf32"
"""Of masks on a GPU, unless they are wanted exactly."""


BATCH = 256
"""Images that torch sees at once."""
MOST_ERROR = 0.05
"""Of the logits that a search is told, in standard deviations of the exact ones."""


class MaskEvaluator:
    """Logits of B masks on N images in one call, by our kernels or by torch."""

    def __init__(
        self,
        trace: Trace,
        model: nn.Module,
        *,
        backend: Backend = "auto",
        device: torch.device | str = "cpu",
        ledger: Ledger | None = None,
    ) -> None:
        """``auto`` takes our kernels, those of the CPU or of the GPU; a network that they cannot
        run is sent to torch with one log line."""
        if backend not in ("auto", "native", "torch"):
            raise UsageError(f"backend must be auto, native or torch, got {backend!r}")
        self.trace = trace
        self.network = FrozenNetwork(trace, model, device)
        self.ledger = ledger or Ledger()
        self.plan: masked_forward.MaskedForwardPlan | None = None
        self.rough_plan: masked_forward.MaskedForwardPlan | None = None
        """The same network with narrower convolutions, for the search; see ``calibrate``."""
        self._rough_precision: SearchPrecision = "fp32"
        self.gpu_plans: dict[GpuPrecision, GpuMaskedForwardPlan] = {}
        """By precision; the one for the search, and another once masks were wanted exactly."""
        self._model = model
        if backend == "torch":
            return
        try:
            if self.network.device.type == "cpu":
                self.plan = masked_forward.lower(trace, model)
            else:
                self._gpu_plan(SEARCH_PRECISION)
        except (UnsupportedOperation, NotBuiltError) as error:
            if backend == "native":
                raise
            log.warning("masks are evaluated by torch: %s", error)

    def _gpu_plan(self, precision: GpuPrecision) -> GpuMaskedForwardPlan:
        if precision not in self.gpu_plans:
            self.gpu_plans[precision] = masked_forward_gpu.lower(
                self.trace, self._model, self.network.device, precision
            )
        return self.gpu_plans[precision]

    @property
    def backend(self) -> str:
        return "torch" if self.plan is None and not self.gpu_plans else "native"

    def calibrate(self, precision: SearchPrecision, pruned: Tensor, images: Tensor) -> None:
        """Let ``run`` be asked for a rough answer, in bf16 or 8 bits, where this processor gains by
        it and this network does not suffer: ranges of 8 bits are those of masks bool [B, S] on half
        of the images float32 [N, C, H, W], errors those on the other half. Both should be like
        those of the search."""
        self.rough_plan, self._rough_precision = None, precision
        pays = {"bf16": masked_forward.halves_pay, "int8": masked_forward.bytes_pay}.get(precision)
        if self.plan is None or pays is None or not pays():
            return
        packed, (seen, unseen) = masks.pack(pruned), (images[::2], images[1::2])
        try:
            ranges = list[masked_forward.Range]()
            if precision == "int8":
                ranges = self.plan.measure_ranges(packed, seen)
                self.ledger.count(len(pruned) * len(seen))
            halves = precision == "bf16"
            rough = masked_forward.lower(self.trace, self._model, ranges, halves=halves)
            if not rough.narrow_convolutions:
                return
            exact = self.plan.run(packed, unseen)
            close = rough.run(packed, unseen)
        except (NativeError, ResourceError) as error:
            log.info("the search stays in fp32: %s", error)
            return
        self.ledger.count(2 * len(pruned) * len(unseen))
        off = float((close - exact).std() / exact.std())
        if off <= MOST_ERROR:
            self.rough_plan = rough
        else:
            log.info(
                "%s errs by %.3f of the logits' spread: the search stays in fp32", precision, off
            )

    @property
    def precision(self) -> Precision:
        """In which convolutions are multiplied during the search."""
        if self.network.device.type == "cpu":
            return "fp32" if self.rough_plan is None else self._rough_precision
        return SEARCH_PRECISION

    def run(
        self,
        pruned: Tensor,
        images: Tensor,
        *,
        exact: bool = False,
        rough: bool = False,
        stay: bool = False,
    ) -> Tensor:
        """Logits float32 [B, N, K], on the CPU, of masks bool [B, S] on images float32
        [N, C, H, W].

        What neighbouring masks have in common is computed once (on the CPU). ``exact``: in fp32
        throughout, on a GPU too. ``rough``: in bf16 or 8 bits, if calibrated for them.
        ``stay``: the logits stay on the network's device.
        """
        self.ledger.count(len(pruned) * len(images))
        try:
            if self.gpu_plans:
                gpu_plan = self._gpu_plan("fp32" if exact else SEARCH_PRECISION)
                logits = gpu_plan.run(pruned, images)
                return logits if stay else logits.cpu()
            if self.plan is not None:
                plan = self.rough_plan if rough and self.rough_plan is not None else self.plan
                return plan.run(masks.pack(pruned), images)
        except ResourceError as error:  # large images: sharing keeps every value
            log.warning("masks are evaluated by torch: %s", error)
            self.plan = self.rough_plan = None
            self.gpu_plans.clear()
        logits = self._by_torch(pruned, images, exact=exact)
        return logits if stay else logits.cpu()

    @torch.no_grad()
    def _by_torch(self, pruned: Tensor, images: Tensor, *, exact: bool) -> Tensor:
        if not len(pruned):
            size = (0, len(images), self.trace.num_classes)
            return torch.empty(size, device=self.network.device)
        gates = (~pruned).float().to(self.network.device)
        with cudnn.flags(enabled=True, allow_tf32=not exact):
            rows = [
                torch.cat([self.network(part, gate) for part in images.split(BATCH)])
                for gate in gates
            ]
        return torch.stack(rows)
