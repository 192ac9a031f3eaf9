"""BNP: norm statistics that clean images do not bear out (Zheng et al., "Pre-activation
Distributions Expose Backdoor Neurons", NeurIPS 2022, section 4.3)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.defences.api import Info, defence
from bench.defences.common import AUGMENTATION, NormLayer, logits_on, norm_of, require_norms
from bench.defences.outliers import DEVIATIONS, prune_outliers
from bench.zoo.training import augment
from onp.data import ImageSet
from onp.ledger import Ledger


@defence("bnp")
def bnp(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    deviations: float = DEVIATIONS,
) -> tuple[nn.Module, Info]:
    """Prune norm channels whose clean statistics diverge from the running ones by more than the
    layer's mean + u standard deviations. One pass over the clean images, cropped at random as
    training images are."""
    layers = require_norms(model, "BNP")
    suspect = copy.deepcopy(model).eval()
    images = augment(clean.images, AUGMENTATION, torch.Generator().manual_seed(seed))
    scores = statistics_divergence(suspect, layers, images, ledger)
    repaired, info = prune_outliers(suspect, layers, scores, deviations)
    info.schedule = "all clean images in one pass, where the published code has one batch"
    return repaired, info


@torch.no_grad()
def statistics_divergence(
    model: nn.Module, layers: list[NormLayer], images: Tensor, ledger: Ledger
) -> Tensor:
    """KL(N(m1, v1) || N(m2, v2)) of every norm channel's input, float32 [U]: m1 and v1 over images
    float32 [N, 3, H, W] and places, m2 and v2 the norm's running statistics.

    (ln(v2 / v1) + (v1 + (m1 - m2)^2) / v2 - 1) / 2; BackdoorBench's code lacks the half before the
    logarithm. Both variances get the norm's eps, so that dead channels stay finite. The network
    runs in eval mode; a norm that is not run has NaN.
    """
    sums: dict[str, Tensor] = {}  # float64 [3, C]: values, their sum, the sum of their squares
    handles = [
        norm_of(model, layer).register_forward_pre_hook(_collect(layer.name, sums))
        for layer in layers
    ]
    try:
        logits_on(model, images, ledger)
    finally:
        for handle in handles:
            handle.remove()
    scores = torch.full((sum(layer.channels for layer in layers),), torch.nan)
    for layer in layers:
        if layer.name not in sums:
            continue
        norm = norm_of(model, layer)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        count, total, squares = sums[layer.name].unbind()
        mean = total / count
        own = (squares / count - mean**2).clamp_min(0) + norm.eps
        running = norm.running_var.double() + norm.eps
        apart = (mean - norm.running_mean.double()) ** 2
        scores[layer.units] = (
            (((running / own).log() + (own + apart) / running - 1) / 2).float().cpu()
        )
    return scores


def _collect(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        flat = args[0].transpose(0, 1).flatten(1).double()  # [C, N * places]
        count = torch.full_like(flat[:, 0], flat.shape[1])
        seen = torch.stack([count, flat.sum(1), flat.square().sum(1)])
        sums[name] = sums[name] + seen if name in sums else seen

    return hook
