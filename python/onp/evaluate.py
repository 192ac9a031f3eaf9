"""Evaluate many masks of one network: plan once, run many."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from onp import masks
from onp.errors import ResourceError, UnsupportedOperation, UsageError
from onp.ledger import Ledger
from onp.ops.masked_forward import MaskedForwardPlan, lower
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import Trace

log = logging.getLogger("onp")

Backend = Literal["auto", "native", "torch"]


class MaskEvaluator:
    """Logits of B masks on N images in one call, by the native engine or by torch."""

    def __init__(
        self,
        trace: Trace,
        model: nn.Module,
        *,
        backend: Backend = "auto",
        threads: int | None = None,
        device: torch.device | str = "cpu",
        ledger: Ledger | None = None,
        batch: int = 256,
    ) -> None:
        """``auto`` takes the native engine on the CPU and torch elsewhere; a network that the
        engine cannot run is sent to torch with one log line. ``batch``: images torch sees at once.
        """
        if backend not in ("auto", "native", "torch"):
            raise UsageError(f"backend must be auto, native or torch, got {backend!r}")
        self.trace = trace
        self.network = FrozenNetwork(trace, model, device)
        self.threads = threads
        self.ledger = ledger or Ledger()
        self.batch = batch
        self.plan: MaskedForwardPlan | None = None
        on_cpu = torch.device(device).type == "cpu"
        if backend == "native" or (backend == "auto" and on_cpu):
            try:
                self.plan = lower(trace, model)
            except UnsupportedOperation as error:
                if backend == "native":
                    raise
                log.warning("masks are evaluated by torch: %s", error)

    @property
    def backend(self) -> str:
        return "native" if self.plan is not None else "torch"

    def run(self, pruned: Tensor, images: Tensor, *, share: bool = True) -> Tensor:
        """Logits float32 [B, N, K] of masks bool [B, S] on images float32 [N, C, H, W].

        ``share``: compute what neighbouring masks have in common once (native engine).
        """
        self.ledger.count(len(pruned) * len(images))
        if self.plan is not None:
            packed = masks.pack(pruned)
            try:
                return self.plan.run(packed, images, share=share, threads=self.threads)
            except ResourceError as error:  # large images: sharing keeps every value
                log.warning("masks are evaluated by torch: %s", error)
                self.plan = None
        with torch.no_grad():
            gates = (~pruned).float().to(self.network.device)
            rows = [
                torch.cat([self.network(part, gate) for part in images.split(self.batch)])
                for gate in gates
            ]
        if not rows:
            return torch.empty(0, len(images), self.trace.num_classes)
        return torch.stack(rows).cpu()
