"""CLP: channels of large Lipschitz constant (Zheng et al., "Data-free Backdoor Removal based on
Channel Lipschitzness", ECCV 2022, sections 4.2 and 4.3)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.defences.api import Info, defence
from bench.defences.common import NormLayer, norm_of, require_norms, traced
from bench.defences.outliers import DEVIATIONS, prune_outliers
from onp.data import ImageSet
from onp.ledger import Ledger
from onp.suspect.network import norm_affine
from onp.suspect.trace import Trace

PASSED = ("add", "relu", "relu6", "maxpool", "avgpool", "globalpool")
"""Operations between a convolution and its norm that keep channels apart and add no factor."""


@defence("clp")
def clp(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,  # noqa: ARG001
    ledger: Ledger,  # noqa: ARG001
    deviations: float = DEVIATIONS,
) -> tuple[nn.Module, Info]:
    """Prune norm channels whose Lipschitz bound exceeds the layer's mean + u standard deviations.

    Data-free: only the images' size is used, to trace the network; no image is run and the seed has
    no effect.
    """
    layers = require_norms(model, "CLP")
    suspect = copy.deepcopy(model).eval()
    bounds = channel_lipschitz(suspect, traced(suspect, clean), layers)
    repaired, info = prune_outliers(suspect, layers, bounds, deviations)
    info.schedule = "a norm's kernels from the traced graph, stacked where it reads a residual sum"
    return repaired, info


@torch.no_grad()
def channel_lipschitz(model: nn.Module, trace: Trace, layers: list[NormLayer]) -> Tensor:
    """sigma_max(K_j as [C_in, kh * kw]) * |scale_j| for every norm channel: float32 [U].

    scale_j = w_j / sqrt(running_var_j + eps), the factor the norm applies (the published code has
    no eps there, and divides by zero on dead channels). K is the kernel that produces the norm's
    input in the traced graph. A norm that reads a residual sum (pre-activation) has several: the
    sum is one linear map of all their inputs, so their kernels are stacked along C_in, smaller
    ones centred in the largest. Producers behind another norm or a change of layout are left out;
    a norm without any has NaN.
    """
    bounds = torch.full((sum(layer.channels for layer in layers),), torch.nan)
    by_name = {layer.name: layer for layer in layers}
    for index, op in enumerate(trace.ops):
        layer = by_name.get(str(op.module))
        producers = _producers(trace, index) if layer is not None else []
        if layer is None or not producers:
            continue
        kernels = _stacked([model.get_submodule(str(trace.ops[p].module)) for p in producers])
        norms = torch.linalg.matrix_norm(kernels.flatten(2), ord=2)  # [C]
        scale, _ = norm_affine(norm_of(model, layer))
        bounds[layer.units] = (norms * scale.abs()).cpu()
    return bounds


def _producers(trace: Trace, norm: int) -> list[int]:
    """Convolutions and linear layers whose outputs the norm reads, alone or as terms of a sum."""
    found: set[int] = set()
    stack = list(trace.ops[norm].inputs)
    while stack:
        value = stack.pop()
        op = trace.ops[value]
        if op.kind in ("conv", "linear"):
            found.add(value)
        elif op.kind in PASSED:
            stack.extend(op.inputs)
    return sorted(found)


def _stacked(modules: list[nn.Module]) -> Tensor:
    """Kernels [C, inputs of all modules, kh, kw]."""
    kernels = []
    for module in modules:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        weight = module.weight
        kernels.append(weight if weight.ndim == 4 else weight[:, :, None, None])
    height = max(kernel.shape[2] for kernel in kernels)
    width = max(kernel.shape[3] for kernel in kernels)
    return torch.cat([_centred(kernel, height, width) for kernel in kernels], 1)


def _centred(kernel: Tensor, height: int, width: int) -> Tensor:
    rows, columns = height - kernel.shape[2], width - kernel.shape[3]
    return F.pad(kernel, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
