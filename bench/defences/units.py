"""Units with a soft mask, for the defences that optimise one (ANP, RNP), and how a mask is cut.

With batch norms a unit is a norm's channel, its mask a factor on the norm's scale, and pruning it
sets the scale to zero while the shift stays, as in both papers' code: the channel is then constant
rather than absent, so thresholds are judged by running the network with those very weights, not by
the site masks of ``onp.evaluate`` (which also reach fewer norms: those before a residual sum belong
to no site alone). Without norms a unit is a site of the traced graph, its mask a gate.
"""

from __future__ import annotations

from functools import partial
from math import ceil
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

MOST_PRUNED = 0.1
"""Share of the units that the sweep ends at; RNP's authors report 28 of 4,800 as enough."""


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


def cut_by_number(
    units: Units, soft: Tensor, clean: ImageSet, ledger: Ledger, *, ties: Tensor | None = None
) -> tuple[nn.Module, Info]:
    """Prune the k units of the smallest soft mask float32 [U]: the largest k of the sweep that
    costs at most ``ACCURACY_LIMIT`` of accuracy on the clean set.

    The authors of ANP offer this cut beside the one by threshold; thresholds mean little after a
    schedule that was shortened, the order does. ``ties`` float32 [U] orders units of equal masks,
    smallest first. Units whose mask is still 1 were never let go and are not pruned. ``units``
    belong to the network in eval mode. Costs an image-forward for every image and every count.
    Candidates: the sweep.
    """
    soft = soft.detach().cpu()
    order = torch.arange(units.count) if ties is None else ties.cpu().argsort(stable=True)
    order = order[soft[order].argsort(stable=True)]
    counts = sweep_of(min(int((soft < 1).sum()), ceil(MOST_PRUNED * units.count)))
    pruned = torch.zeros(len(counts), units.count, dtype=torch.bool)
    for row, count in zip(pruned, counts, strict=True):
        row[order[:count]] = True
    right = accuracy(units.pruned_logits(pruned, clean.floats(), ledger), clean.labels)
    allowed = (right[0] - right <= ACCURACY_LIMIT + 1e-6).nonzero().squeeze(1).tolist()
    pick = allowed[-1]  # 0 units are always allowed
    low, middle, high = torch.quantile(soft, torch.tensor([0.01, 0.1, 0.5])).tolist()
    info = Info(
        settings={
            "pruned": counts[pick],
            "units": units.count,
            "clean_accuracy_before": round(float(right[0]), 4),
            "clean_accuracy_after": round(float(right[pick]), 4),
            "mask_percentiles_1_10_50": [round(value, 3) for value in (low, middle, high)],
            "masks_at_zero": int((soft == 0).sum()),
        },
        candidates=[
            (f"{count} units", partial(units.prune, mask))
            for count, mask in zip(counts, pruned, strict=True)
        ],
    )
    return units.prune(pruned[pick]), info


def sweep_of(most: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to ``most``."""
    counts = {0, most} | {step << power for power in range(most.bit_length()) for step in (2, 3)}
    return sorted(count for count in counts | {1} if count <= most)
