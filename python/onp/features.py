"""Node features of the neuron graph, normalised within the layer so that they carry over
between architectures. Probe and unlearning responses arrive as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onp.graph import NeuronGraph
from onp.suspect.network import norm_affine
from onp.suspect.trace import Trace

NAMES = (
    "strength_in", "strength_out", "norm_scale", "norm_offset", "lipschitz",
    "activation_mean", "activation_deviation", "activation_zeros",
    "norm_shift", "gate",
    "unlearning", "response", "response_others", "response_advantage",
    "depth", "width", "spatial",
)  # fmt: skip
"""Columns of the feature matrix."""
CLAMP = 5.0


def node_features(
    trace: Trace,
    model: nn.Module,
    graph: NeuronGraph,
    statistics: Tensor,
    shift: Tensor,
    gates: Tensor,
    unlearning: Tensor,
    suspected: Sequence[Tensor],
    others: Sequence[Tensor],
) -> Tensor:
    """The feature matrix float32 [S, len(NAMES)].

    statistics: [S, 3] activation mean, deviation, zeros. shift: [S] of the site's norm. gates: [S]
    how far they have closed. unlearning: [S] response to unlearning. What was not measured is 0.
    suspected, others: responses [S] to the probes that point at the suspected class, and to those
    that do not; either may be empty.
    """
    scale, offset = _norms(trace, model)
    zero = torch.zeros(trace.sites)
    towards = torch.stack(list(suspected)).mean(0) if suspected else zero
    away = torch.stack(list(others)).mean(0) if others else zero
    advantage = towards.log1p() - away.log1p() if others else zero
    measured = torch.stack(
        [
            graph.strength_in, graph.strength_out, scale, offset, channel_lipschitz(trace, model),
            *statistics.unbind(1), shift.abs().log1p(), gates,
            unlearning.log1p(), towards.log1p(), away.log1p(), advantage,
        ],
        1,
    )  # fmt: skip
    normalised = torch.empty_like(measured)
    places = torch.empty(trace.sites, 3)
    for number, layer in enumerate(trace.layers):
        part = measured[layer.sites]
        deviation = part.std(0, correction=0).clamp_min(1e-6)
        normalised[layer.sites] = ((part - part.mean(0)) / deviation).clamp(-CLAMP, CLAMP)
        pixels = trace.shapes[layer.value][1:]
        area = float(math.prod(pixels))
        places[layer.sites] = torch.tensor(
            [
                2 * number / max(len(trace.layers) - 1, 1) - 1,
                torch.tensor(layer.channels / 64).log2().item() / 3,
                torch.tensor(area / 64).log2().item() / 4,
            ]
        )
    return torch.cat([normalised, places], 1)


def _norms(trace: Trace, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of each site's own norm (a layer or group norm's after it standardised);
    (1, 0) where it has none."""
    scale, shift = torch.ones(trace.sites), torch.zeros(trace.sites)
    for layer in trace.layers:
        if layer.norm is None:
            continue
        module = model.get_submodule(str(trace.ops[layer.norm].module))
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.InstanceNorm2d):
            scale[layer.sites] = module.weight.detach().float().cpu()
            if module.bias is not None:
                shift[layer.sites] = module.bias.detach().float().cpu()
        else:
            assert isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
            scale[layer.sites], shift[layer.sites] = (part.cpu() for part in norm_affine(module))
    return scale, shift


def channel_lipschitz(trace: Trace, model: nn.Module) -> Tensor:
    """Upper bound of each channel's Lipschitz constant, float32 [S] (CLP, Zheng et al., ECCV 2022).

    The largest singular value of the filter of the nearest producer that makes the channel,
    reshaped [inputs, kernel], times the absolute scale of the norm that belongs to the site.
    """
    bound = torch.zeros(trace.sites)
    filter_norms: dict[int, Tensor] = {}  # by producer
    for layer in trace.layers:
        channels = trace.channels.of_value[layer.value]
        missing = torch.ones(layer.channels, dtype=torch.bool)
        part = torch.zeros(layer.channels)
        for producer in layer.producers:
            if not bool(missing.any()):
                break
            if producer not in filter_norms:
                filter_norms[producer] = _filter_norms(trace.ops[producer].weights(model)[0])
            norms = filter_norms[producer]
            made = trace.channels.of_value[producer]
            if torch.equal(made, channels):
                rows, sites = torch.arange(len(made)), torch.arange(len(channels))
            else:  # a concatenation, an attention's values, an option-A shortcut
                rows, sites = (made[:, None] == channels).nonzero(as_tuple=True)
            fresh = missing[sites]
            part[sites[fresh]] = norms[rows[fresh]]
            missing[sites] = False
        bound[layer.sites] = part
    return bound * _norms(trace, model)[0].abs()


def _filter_norms(weight: Tensor) -> Tensor:
    """Largest singular value of each output's filter [inputs, kernel], float32 [O].

    All filters of a layer are taken in one batched call on the small Gram matrices.
    """
    weight = weight.detach().float()
    if weight.ndim == 2:
        return weight.norm(dim=1).cpu()
    filters = weight.flatten(2)  # [O, I, K]
    gram = filters.transpose(1, 2) @ filters  # [O, K, K]
    return torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt().cpu()
