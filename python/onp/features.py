"""Node features of the neuron graph, normalised within the layer so that they carry over
between architectures. Probe and unlearning responses arrive as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onp.graph import NeuronGraph
from onp.suspect.network import norm_affine
from onp.suspect.trace import Trace

NAMES = (
    "strength_in", "strength_out", "norm_scale", "norm_shift", "lipschitz",
    "activation_mean", "activation_deviation", "activation_zeros",
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
    unlearning: Tensor,
    suspected: Sequence[Tensor],
    others: Sequence[Tensor],
) -> Tensor:
    """The feature matrix float32 [S, len(NAMES)].

    statistics: [S, 3] activation mean, deviation, zeros. unlearning: [S] response to unlearning.
    suspected, others: responses [S] to the probes that point at the suspected class, and to those
    that do not; either may be empty.
    """
    scale, shift = _norms(trace, model)
    zero = torch.zeros(trace.sites)
    towards = torch.stack(list(suspected)).mean(0) if suspected else zero
    away = torch.stack(list(others)).mean(0) if others else zero
    measured = torch.stack(
        [
            graph.strength_in, graph.strength_out, scale, shift, channel_lipschitz(trace, model),
            *statistics.unbind(1),
            unlearning.log1p(), towards.log1p(), away.log1p(), towards.log1p() - away.log1p(),
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
        area = float(pixels[0] * pixels[1]) if pixels else 1.0
        places[layer.sites] = torch.tensor(
            [
                2 * number / max(len(trace.layers) - 1, 1) - 1,
                torch.tensor(layer.channels / 64).log2().item() / 3,
                torch.tensor(area / 64).log2().item() / 4,
            ]
        )
    return torch.cat([normalised, places], 1)


def _norms(trace: Trace, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of each site's own norm; (1, 0) where it has none."""
    scale, shift = torch.ones(trace.sites), torch.zeros(trace.sites)
    for layer in trace.layers:
        if layer.norm is not None:
            module = model.get_submodule(str(trace.ops[layer.norm].module))
            assert isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
            scale[layer.sites], shift[layer.sites] = (part.cpu() for part in norm_affine(module))
    return scale, shift


def channel_lipschitz(trace: Trace, model: nn.Module) -> Tensor:
    """Upper bound of each channel's Lipschitz constant, float32 [S] (CLP, Zheng et al., ECCV 2022).

    The largest singular value of the nearest producer's filter, reshaped [inputs, kernel], times
    the absolute scale of the norm that belongs to the site. Singular values of all filters of a
    layer are taken in one batched call on the small Gram matrices.
    """
    bound = torch.zeros(trace.sites)
    scale, _ = _norms(trace, model)
    for layer in trace.layers:
        producer = layer.producers[0]
        channels = trace.channels.of_value[producer]
        if not torch.equal(channels, trace.channels.of_value[layer.value]):
            continue  # an option-A shortcut or a reshape between them: no filter is the site's own
        module = model.get_submodule(str(trace.ops[producer].module))
        assert isinstance(module, nn.Conv2d | nn.Linear)
        filters = module.weight.detach().float().flatten(2) if module.weight.ndim > 2 else None
        if filters is None:
            norms = module.weight.detach().float().norm(dim=1)
        else:  # [O, I, K]: K x K Gram matrices
            gram = filters.transpose(1, 2) @ filters
            norms = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()
        bound[layer.sites] = norms.cpu()
    return bound * scale.abs()
