"""Units with a soft mask, for the defences that optimise one (ANP, RNP), and how a mask is cut.

With batch norms a unit is a norm's channel, its mask a factor on the norm's scale, and pruning it
sets the scale to zero while the shift stays, as in both papers' code: the channel is then constant
rather than absent, so thresholds are judged by running the network with those very weights, not by
the site masks of ``onp.evaluate`` (which also reach fewer norms: those before a residual sum belong
to no site alone). Without norms a unit is a site of the traced graph, its mask a gate.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.defences.api import Info
from bench.defences.common import (
    ACCURACY_LIMIT,
    NormLayer,
    accuracy,
    device_of,
    norm_layers,
    norm_of,
    traced,
    zero_norms,
)
from onp.data import ImageSet
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.suspect.network import FrozenNetwork, training_layout
from onp.suspect.surgery import apply_mask
from onp.suspect.trace import Trace

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(19))
"""0, .05, ... .9: the sweep of both authors."""


class Units(Protocol):
    """The prunable units of one network; float32 masks [U] and bool prunings [U]."""

    count: int
    device: torch.device
    shifted: bool
    """Whether units have a shift that can be scaled too."""

    def logits(self, images: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        """Logits [N, K] under factors [U] on every unit's scale and shift; differentiable in them.

        The network runs in the mode (training or not) it was given in.
        """
        ...

    def pruned_logits(self, pruned: Tensor, images: Tensor, ledger: Ledger) -> Tensor:
        """Logits float32 [B, N, K] of prunings bool [B, U], counted; for networks in eval mode."""
        ...

    def prune(self, pruned: Tensor) -> nn.Module:
        """A copy of the network with the units pruned."""
        ...


class NormUnits:
    """The channels of every batch norm."""

    shifted = True

    def __init__(self, model: nn.Module, layers: list[NormLayer]) -> None:
        self.model = model
        self.layers = layers
        self.count = sum(layer.channels for layer in layers)
        self.device = device_of(model)
        self.layout = training_layout(model)

    def logits(self, images: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        changed: dict[str, Tensor] = {}
        for layer in self.layers:
            norm = norm_of(self.model, layer)
            changed[f"{layer.name}.weight"] = norm.weight.detach() * scale[layer.units]
            if shift is not None:
                changed[f"{layer.name}.bias"] = norm.bias.detach() * shift[layer.units]
        images = images.to(self.device).contiguous(memory_format=self.layout)
        logits: Tensor = functional_call(self.model, changed, (images,))
        return logits

    @torch.no_grad()
    def pruned_logits(self, pruned: Tensor, images: Tensor, ledger: Ledger) -> Tensor:
        ledger.count(len(pruned) * len(images))
        keep = (~pruned).float().to(self.device)
        rows = [
            torch.cat([self.logits(part, factors).cpu() for part in images.split(250)])
            for factors in keep
        ]
        return torch.stack(rows)

    def prune(self, pruned: Tensor) -> nn.Module:
        return zero_norms(self.model, self.layers, pruned, shift=False)


class SiteUnits:
    """The sites of the traced graph, for networks without batch norms; they have no shift."""

    shifted = False

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.count = trace.sites
        self.device = device_of(model)
        self.network = FrozenNetwork(trace, model, self.device)

    def logits(self, images: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        assert shift is None
        return self.network(images, scale)

    def pruned_logits(self, pruned: Tensor, images: Tensor, ledger: Ledger) -> Tensor:
        evaluator = MaskEvaluator(self.trace, self.model, device=self.device, ledger=ledger)
        return evaluator.run(pruned, images)

    def prune(self, pruned: Tensor) -> nn.Module:
        return apply_mask(self.model, self.trace, pruned)


def units_of(model: nn.Module, judged: nn.Module, clean: ImageSet) -> Units:
    """``model``'s units: norm channels, or sites of its trace. ``judged``: the same architecture
    in eval mode, which is what gets traced. Raises NotApplicable where it cannot be."""
    layers = norm_layers(model)
    return NormUnits(model, layers) if layers else SiteUnits(model, traced(judged, clean))


def cut_by_threshold(
    units: Units, soft: Tensor, clean: ImageSet, ledger: Ledger
) -> tuple[nn.Module, Info]:
    """Prune the units whose soft mask float32 [U] is at most t: the largest t of the sweep that
    costs at most ``ACCURACY_LIMIT`` of accuracy on the clean set; none where every t costs more.

    ``units`` belong to the network in eval mode. Costs an image-forward for every image and every
    distinct pruning. Candidates: the sweep.
    """
    soft = soft.detach().cpu()
    sweep = soft <= torch.tensor(THRESHOLDS)[:, None]  # bool [T, U]
    distinct, row = sweep.unique(dim=0, return_inverse=True)
    nothing = torch.zeros(1, units.count, dtype=torch.bool)
    logits = units.pruned_logits(torch.cat([nothing, distinct]), clean.floats(), ledger)
    right = accuracy(logits, clean.labels)
    before, after = right[0], right[1 + row]
    allowed = (before - after <= ACCURACY_LIMIT + 1e-6).nonzero().squeeze(1).tolist()
    pick = allowed[-1] if allowed else None
    pruned = nothing[0] if pick is None else sweep[pick]
    info = Info(
        settings={
            "threshold": None if pick is None else THRESHOLDS[pick],
            "pruned": int(pruned.sum()),
            "units": units.count,
            "clean_accuracy_before": round(float(before), 4),
            "clean_accuracy_after": round(float(before if pick is None else after[pick]), 4),
        },
        candidates=[
            (f"threshold {threshold:.2f}", partial(units.prune, mask))
            for index, (threshold, mask) in enumerate(zip(THRESHOLDS, sweep, strict=True))
            if index == 0 or int(row[index]) != int(row[index - 1])
        ],
    )
    return units.prune(pruned), info
