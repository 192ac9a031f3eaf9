"""Write a mask into a network: *applied* (same shapes) or *removed* (a smaller dense network)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from onp.errors import UntraceableModel
from onp.suspect.architectures.resnet import SubsamplePad
from onp.suspect.trace import SiteLayer, Trace


@torch.no_grad()
def apply_mask(model: nn.Module, trace: Trace, pruned: Tensor) -> nn.Module:
    """A copy of ``model`` that computes what the mask says, with every shape as it was.

    pruned: bool [S]. Where a norm belongs to the site alone its scale and shift are zeroed,
    elsewhere the consumers' weights that read the channel.
    """
    repaired = copy.deepcopy(model).eval()
    for layer in trace.layers:
        cut = pruned[layer.sites]
        if not bool(cut.any()):
            continue
        if layer.norm is not None and _zero_norm(repaired, trace, layer, cut):
            continue
        for consumer in layer.consumers:
            _zero_columns(repaired, trace, layer, consumer, cut)
    return repaired


def check_writable(model: nn.Module, trace: Trace) -> None:
    """Raise UntraceableModel where a mask would have to be written into a weight that a
    parametrisation makes anew for every pass."""
    for layer in trace.layers:
        norm = None if layer.norm is None else trace.ops[layer.norm].module
        holders = (
            [norm]
            if norm is not None and _has_scale(model.get_submodule(norm))
            else [trace.ops[consumer].module for consumer in layer.consumers]
        )
        for name in holders:
            if parametrize.is_parametrized(model.get_submodule(str(name))):
                raise UntraceableModel(
                    f"{name} is parametrised, so that its weights cannot be pruned: call "
                    "torch.nn.utils.parametrize.remove_parametrizations on it first"
                )


def _has_scale(norm: nn.Module) -> bool:
    return getattr(norm, "weight", None) is not None


_AVERAGING = nn.LayerNorm | nn.GroupNorm | nn.InstanceNorm2d


def _zero_norm(model: nn.Module, trace: Trace, layer: SiteLayer, cut: Tensor) -> bool:
    assert layer.norm is not None
    norm = model.get_submodule(str(trace.ops[layer.norm].module))
    assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d | _AVERAGING)
    if not _has_scale(norm):
        return False
    cut = cut.to(norm.weight.device)
    norm.weight[cut] = 0
    if norm.bias is not None:
        norm.bias[cut] = 0
    return True


def _zero_columns(
    model: nn.Module, trace: Trace, layer: SiteLayer, consumer: int, cut: Tensor
) -> None:
    module = model.get_submodule(str(trace.ops[consumer].module))
    weight, _ = trace.ops[consumer].weights(model)
    columns = cut.repeat_interleave(trace.consumer_span(layer, consumer)).to(weight.device)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        # weight is [O, I / groups, ...]: output o reads the inputs of its own group
        per_group = module.out_channels // module.groups
        of_group = columns.view(module.groups, -1)  # [groups, I / groups]
        weight[of_group.repeat_interleave(per_group, 0)] = 0
    else:
        weight[:, columns] = 0


@torch.no_grad()
def remove_mask(model: nn.Module, trace: Trace, pruned: Tensor) -> tuple[nn.Module, int]:
    """A smaller network with the same logits as ``apply_mask``, and how many sites stayed.

    A channel can be cut out when every site of its group is pruned; a lone site on a residual
    stream stays as zeroed weights and is counted, and so do channels that the model's code counts.
    Every layer keeps at least one channel.
    """
    applied = _plain(apply_mask(model, trace, pruned))
    smaller, stayed = _removed(applied, trace, pruned, trace.channels.fixed)
    if trace.channels.counted and not _same(smaller, applied, trace.shapes[0]):
        counted = trace.channels.fixed | trace.channels.counted
        smaller, stayed = _removed(applied, trace, pruned, counted)
    return smaller, stayed


def _plain(model: nn.Module) -> nn.Module:
    """With the weights that parametrisations give, in place of these. Torch's own way to remove
    them takes them from every copy, as these share a class that was made for them."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            names = list(module.parametrizations)  # type: ignore[arg-type]
            weights = {name: getattr(module, name).detach().clone() for name in names}
            del module.parametrizations
            module.__class__ = type(module).__base__  # type: ignore[assignment]
            for name, weight in weights.items():
                module.register_parameter(name, nn.Parameter(weight))
    return model


def _same(smaller: nn.Module, applied: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Whether both give the same logits, of drawn images."""
    parameter = next(applied.parameters())
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(parameter.device, parameter.dtype)
    try:
        got, expected = smaller(images), applied(images)
    except Exception:  # the code counts channels in some way of its own
        return False
    return bool((got - expected).abs().max() <= 1e-2 * expected.abs().max().clamp_min(1.0))


def _removed(
    applied: nn.Module, trace: Trace, pruned: Tensor, fixed: frozenset[int]
) -> tuple[nn.Module, int]:
    cut = _cuttable(trace, pruned, fixed)
    smaller = copy.deepcopy(applied)
    for index, op in enumerate(trace.ops):
        if op.kind not in ("conv", "linear", "norm", "subsample_pad"):
            continue
        module = smaller.get_submodule(str(op.module))
        keep_out = ~torch.isin(trace.channels.of_value[index], cut)
        keep_in = ~torch.isin(trace.channels.of_value[op.inputs[0]], cut)
        if bool(keep_out.all()) and bool(keep_in.all()):
            continue
        if op.kind == "subsample_pad":
            _shrink_subsample_pad(module, keep_in, keep_out)
        elif op.kind == "norm":
            _shrink_norm(module, keep_out)
        else:
            _shrink_weighted(module, keep_in, keep_out)
    sites = torch.cat([trace.channels.of_value[layer.value] for layer in trace.layers])
    stayed = int((pruned & ~torch.isin(sites, cut)).sum())
    return smaller, stayed


def _cuttable(trace: Trace, pruned: Tensor, fixed: frozenset[int]) -> Tensor:
    """Channel numbers (see Channels) that no unpruned site reads and that may go."""
    sites = torch.cat([trace.channels.of_value[layer.value] for layer in trace.layers])
    alive = set(sites[~pruned].tolist()) | fixed
    cut = {channel for channel in sites[pruned].tolist() if channel not in alive}
    for value in trace.channels.of_value:
        if cut.issuperset(value.tolist()):
            cut.discard(int(value[0]))
    return torch.tensor(sorted(cut), dtype=torch.int64)


def _index(parameter: Tensor, dim: int, keep: Tensor) -> nn.Parameter:
    rows = keep.nonzero().squeeze(1).to(parameter.device)
    return nn.Parameter(parameter.index_select(dim, rows), parameter.requires_grad)


def _shrink_weighted(module: nn.Module, keep_in: Tensor, keep_out: Tensor) -> None:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    weight = _index(module.weight, 0, keep_out)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = int(keep_in.sum()), int(keep_out.sum())
        weight = _index(weight, 1, keep_in)
    else:
        module.in_channels, module.out_channels = int(keep_in.sum()), int(keep_out.sum())
        if module.groups > 1 and module.groups == len(keep_in):  # depthwise: a group a channel
            module.groups = module.in_channels
        else:  # grouped convolutions' channels are never cut, so groups is 1 here
            weight = _index(weight, 1, keep_in)
    module.weight = weight
    if module.bias is not None:
        module.bias = _index(module.bias, 0, keep_out)


def _shrink_norm(module: nn.Module, keep: Tensor) -> None:
    assert isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
    module.num_features = int(keep.sum())
    if module.affine:
        module.weight = _index(module.weight, 0, keep)
        module.bias = _index(module.bias, 0, keep)
    assert module.running_mean is not None
    assert module.running_var is not None
    module.running_mean = module.running_mean[keep.to(module.running_mean.device)]
    module.running_var = module.running_var[keep.to(module.running_var.device)]


def _shrink_subsample_pad(module: nn.Module, keep_in: Tensor, keep_out: Tensor) -> None:
    assert isinstance(module, SubsamplePad)
    place = keep_out.cumsum(0) - 1  # old output channel -> new
    kept = [p for p, keep in zip(module.positions, keep_in.tolist(), strict=True) if keep]
    module.positions = [int(place[p]) for p in kept]
    module.channels = int(keep_out.sum())
