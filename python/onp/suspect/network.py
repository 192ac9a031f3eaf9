"""The traced network as a frozen function of images and site gates: norms folded, NHWC inside.

Channels come first in every value's shape and last in memory: maps are [N, C, H, W] in the
channels-last layout, tokens [N, C, T] are transposed views of [N, T, C].

One executor serves the torch backend of mask evaluation, the probes (gradients with respect to
the images) and the activation statistics. It holds its own copy of the weights. On the CPU, what
the native engine has is left to it; on a GPU, calls that repeat are replayed from CUDA graphs.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cudnn

from onp.errors import NotBuiltError, UnsupportedOperation
from onp.ops import masked_gradient, masked_gradient_gpu
from onp.suspect.movement import in_order
from onp.suspect.operations import tensor_of
from onp.suspect.replayed import Replayed, is_one_row
from onp.suspect.trace import SiteLayer, Trace

log = logging.getLogger("onp")

REPLAYED_FROM = 2
"""Calls of one shape after which gradients on a GPU are replayed from a CUDA graph."""
MOST_GRAPHS = 4


_Plan = masked_gradient.MaskedGradientPlan | masked_gradient_gpu.GpuMaskedGradientPlan


@dataclass
class _Affine:
    scale: Tensor  # [C]
    shift: Tensor  # [C]


def norm_affine(module: nn.BatchNorm2d | nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """The per-channel (scale, shift), float32 [C] each, that an eval-mode batch norm applies."""
    assert module.running_mean is not None
    assert module.running_var is not None
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -module.running_mean.double() * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    return scale.float(), shift.float()


def training_layout(model: nn.Module) -> torch.memory_format:
    """Memory format for computing weight gradients: channels last, where it is safe.

    torch 2.13's CPU convolutions write past the weight gradient, and so abort the process, on
    channels-last inputs to layers narrower than 8 channels (seen for 1 to 7, not from 8 on; image
    inputs are unaffected) and, with AVX-512, to strided 1x1 layers of fewer than 16 input channels
    (seen for 3, 8, 12, 13 and 15, not from 16 on). The usual layout has neither fault.
    """
    safe = all(
        conv.out_channels >= 8
        and (conv.in_channels >= 8 or conv.in_channels <= 3)
        and (conv.in_channels >= 16 or conv.kernel_size != (1, 1) or conv.stride == (1, 1))
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d)
    )
    return torch.channels_last if safe else torch.contiguous_format


class FrozenNetwork:
    """Evaluates a trace with weights taken from ``model`` when built; float32."""

    def __init__(
        self,
        trace: Trace,
        model: nn.Module,
        device: torch.device | str = "cpu",
        *,
        native: bool = True,
    ) -> None:
        """native: let the native engine, or Triton kernels and CUDA graphs, compute what they can:
        their gradients cannot be differentiated again."""
        self.trace = trace
        self.device = torch.device(device)
        self._plan: _Plan | None = None
        self._native = native
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, Replayed] = {}
        with contextlib.suppress(UnsupportedOperation, NotBuiltError):
            if native and self.device.type == "cpu":
                self._plan = masked_gradient.lower(trace, model)
            elif native and self.device.type == "cuda":
                self._plan = masked_gradient_gpu.lower(trace, model, self.device)
        self._layer_at = {layer.value: layer for layer in trace.layers}
        readers: list[list[int]] = [[] for _ in trace.ops]
        for index, op in enumerate(trace.ops):
            for value in op.inputs:
                readers[value].append(index)
        self._last_reader = [max(r, default=-1) for r in readers]
        self._weights: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._affines: dict[int, _Affine] = {}
        self._alias: dict[int, int] = {}  # folded norms: their value is their input's
        self._convs: dict[int, nn.Conv2d] = {}
        self._picks: dict[int, list[_Pick]] = {}
        self._places: dict[int, Tensor] = {}  # channels: where a shortcut's go, which are selected
        self._constants: dict[int, Tensor] = {}  # the model's own tensors, [C] or [C, *space]
        with torch.no_grad():
            for index, op in enumerate(trace.ops):
                if op.kind in ("conv", "linear"):
                    self._read_weights(index, model)
                elif op.kind == "norm":
                    module = model.get_submodule(str(op.module))
                    assert isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
                    scale, shift = (part.to(self.device) for part in norm_affine(module))
                    producer = op.inputs[0]
                    if (
                        producer in self._weights
                        and readers[producer] == [index]
                        and producer not in self._layer_at
                    ):
                        self._fold(producer, scale, shift)
                        self._alias[index] = producer
                    else:
                        self._affines[index] = _Affine(scale, shift)
                elif op.kind == "affine":
                    self._affines[index] = _Affine(
                        op.attrs["scale"].to(self.device), op.attrs["shift"].to(self.device)
                    )
                elif op.kind in ("layernorm", "groupnorm") and op.module is not None:
                    self._read_weights(index, model)
                elif op.kind == "select":
                    self._places[index] = op.attrs["channels"].to(self.device)
                elif op.kind == "subsample_pad":
                    self._places[index] = torch.as_tensor(op.attrs["positions"]).to(self.device)
                elif op.kind in ("pick", "attention"):
                    names = ("positions",) if op.kind == "pick" else ("q", "k", "v")
                    behind = math.prod(trace.shapes[op.inputs[0]][1:])
                    self._picks[index] = [_Pick.of(op.attrs[n], behind, self.device) for n in names]
                elif op.kind in ("parameter", "extend"):
                    tensor = tensor_of(model, op.attrs["name"]).detach().float().flatten()
                    place = op.attrs["index"].to(tensor.device)
                    self._constants[index] = tensor[place].to(self.device)

    def _read_weights(self, index: int, model: nn.Module) -> None:
        op = self.trace.ops[index]
        weight, bias = op.weights(model)
        weight = weight.detach().to(self.device, torch.float32, copy=True)
        module = model.get_submodule(str(op.module))
        if isinstance(module, nn.Conv2d):
            weight = weight.contiguous(memory_format=torch.channels_last)
            self._convs[index] = module
        self._weights[index] = (
            weight,
            None if bias is None else bias.detach().to(self.device, torch.float32, copy=True),
        )

    def _fold(self, producer: int, scale: Tensor, shift: Tensor) -> None:
        weight, bias = self._weights[producer]
        view = (-1,) + (1,) * (weight.ndim - 1)
        self._weights[producer] = (
            weight * scale.view(view),
            shift if bias is None else bias * scale + shift,
        )

    def __call__(
        self,
        images: Tensor,
        gates: Tensor | None = None,
        observe: Callable[[SiteLayer, Tensor], None] | None = None,
        observe_norm: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Logits float32 [N, K] of images float32 [N, C, H, W].

        gates: [S] or [N, S] factors on the sites (0 prunes). observe: called with each site layer
        and its activations, [N, C, H, W], [N, C, T] or [N, C], before the gate. observe_norm:
        called with each batch norm's op index and its output.
        """
        if observe is not None or observe_norm is not None:
            return self._run(images, gates, observe, observe_norm)
        if self.device.type == "cuda":
            images = images.to(self.device)
            gates = None if gates is None else gates.to(self.device)
        return (self._replayed(self._logits, images, gates) or self._logits(images, gates))[0]

    def _logits(self, images: Tensor, gates: Tensor | None) -> tuple[Tensor]:
        if (plan := self._plan_for(images, gates)) is not None:
            return (plan(images, gates),)
        return (self._run(images, gates, None, None),)

    def _plan_for(self, images: Tensor, gates: Tensor | None = None) -> _Plan | None:
        """The plan, if it takes these and, on a GPU, TF32 is allowed, in which it multiplies."""
        plan = self._plan
        if plan is None or not plan.accepts(images, gates):
            return None
        usable = self.device.type == "cpu" or (cudnn.allow_tf32 and len(images) > 0)
        return plan if usable else None

    def _run(
        self,
        images: Tensor,
        gates: Tensor | None,
        observe: Callable[[SiteLayer, Tensor], None] | None,
        observe_norm: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        """As a call, operation by operation in torch."""
        values: dict[int, Tensor] = {}
        masked: dict[int, Tensor] = {}
        ops = self.trace.ops
        for index, op in enumerate(ops):
            layer_edges = [
                masked[v]
                if v in masked and (index, p) in self._layer_at[v].masked_edges
                else values[v]
                for p, v in enumerate(op.inputs)
            ]
            values[index] = self._step(index, op.kind, layer_edges, images)
            for value in set(op.inputs):
                if self._last_reader[value] == index:  # free what nothing reads any more
                    del values[value]
                    masked.pop(value, None)
            if observe_norm is not None and op.kind == "norm":
                observe_norm(index, values[index])
            layer = self._layer_at.get(index)
            if layer is not None:
                x = values[index]
                if observe is not None:
                    observe(layer, x)
                if gates is not None:
                    gate = gates[..., layer.sites].to(x.device)
                    masked[index] = x * gate.reshape(-1, layer.channels, *(1,) * (x.ndim - 2))
        return values[len(ops) - 1]

    def with_moments(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, K] of images [N, C, H, W], and mean and variance over the pixels of every
        batch norm's output, float32 [N, U] each, norms in execution order."""
        if self.device.type == "cuda":
            images = images.to(self.device)
        logits, mean, variance = self._replayed(self._moments, images) or self._moments(images)
        return logits, mean, variance

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan = self._plan_for(images)
        if plan is not None and plan.tells_moments:
            return plan.with_moments(images)
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_: int, values: Tensor) -> None:
            flat = values.flatten(2) if values.ndim > 2 else values[:, :, None]
            seen.append(torch.var_mean(flat, 2, correction=0))

        logits = self._run(images, None, None, keep)
        variance, mean = (torch.cat(part, 1) for part in zip(*seen, strict=True))
        return logits, mean, variance

    def _replayed(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """``function(*inputs)`` from a CUDA graph, where gradients are wanted on a GPU of inputs of
        a shape that has come before; else None."""
        if self.device.type != "cuda" or not self._native or not torch.is_grad_enabled():
            return None
        wanted = [one is not None and one.requires_grad for one in inputs]
        if not any(wanted):
            return None
        shapes = [None if one is None else (one.shape, is_one_row(one)) for one in inputs]
        key = (function.__name__, cudnn.allow_tf32, *zip(shapes, wanted, strict=True))
        self._calls[key] = self._calls.get(key, 0) + 1
        if key not in self._graphs:
            if self._calls[key] < REPLAYED_FROM:
                return None
            if len(self._graphs) == MOST_GRAPHS:  # the activations of each stay where they are
                self._graphs.pop(next(iter(self._graphs)))
            graph = self._captured(function, inputs) or self._captured(function, inputs)
            if graph is None:
                log.warning("no room on %s to keep activations: steps take longer", self.device)
                self._calls[key] = -(10**9)
                return None
            self._graphs[key] = graph
        return self._graphs[key](*inputs)

    def _captured(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...]
    ) -> Replayed | None:
        """The function's graph; None without room, all graphs and the allocator's cache then let
        go: a capture cannot use what is cached."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return Replayed(function, inputs)
        self._graphs.clear()
        torch.cuda.empty_cache()
        return None

    def _step(self, index: int, kind: str, inputs: list[Tensor], images: Tensor) -> Tensor:
        op = self.trace.ops[index]
        attrs = op.attrs
        if kind == "input":
            return images.to(self.device).contiguous(memory_format=torch.channels_last)
        x = inputs[0]
        if kind == "conv":
            conv = self._convs[index]
            weight, bias = self._weights[index]
            assert not isinstance(conv.padding, str)
            return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if kind == "linear":
            return F.linear(x.movedim(1, -1), *self._weights[index]).movedim(-1, 1)
        if kind in ("norm", "affine"):
            if index in self._alias:
                return x
            affine = self._affines[index]
            return x * _like(affine.scale, x) + _like(affine.shift, x)
        if kind == "layernorm":
            scale, shift = self._weights.get(index, (None, None))
            x = x.movedim(1, -1)
            return F.layer_norm(x, x.shape[-1:], scale, shift, attrs["eps"]).movedim(-1, 1)
        if kind == "groupnorm":
            scale, shift = self._weights.get(index, (None, None))
            return F.group_norm(x, attrs["groups"], scale, shift, attrs["eps"])
        if kind == "parameter":
            function: Callable[[Tensor, Tensor], Tensor] = getattr(torch, attrs["how"])
            return function(x, _like(self._constants[index], x))
        if kind in _ELEMENTWISE:
            return _ELEMENTWISE[kind](x)
        if kind == "pointwise":
            pointwise: Tensor = attrs["function"](x.clone())  # it may work in place
            return pointwise
        if kind == "gelu":
            return F.gelu(x, approximate=attrs["approximate"])
        if kind == "add":
            return x + inputs[1]
        if kind == "product":
            return x * inputs[1]
        if kind == "concat":
            return torch.cat(inputs, 1)
        if kind == "attention":
            return _attend(op.attrs["scale"], *zip(inputs, self._picks[index], strict=True))
        if kind == "extend":
            parts = [self._constants[index].T.expand(len(x), -1, -1), x.transpose(1, 2)]
            return torch.cat(parts if attrs["front"] else parts[::-1], 1).transpose(1, 2)
        if kind == "maxpool":
            return F.max_pool2d(
                x, attrs["kernel"], attrs["stride"], attrs["padding"], ceil_mode=attrs["ceil_mode"]
            )
        if kind == "avgpool":
            return F.avg_pool2d(
                x, attrs["kernel"], attrs["stride"], attrs["padding"],
                ceil_mode=attrs["ceil_mode"], count_include_pad=attrs["count_include_pad"],
            )  # fmt: skip
        if kind == "globalpool":
            return x.mean(tuple(range(2, x.ndim)), keepdim=True)
        if kind == "subsample_pad":
            s = attrs["stride"]
            out = x.new_zeros(x.shape[0], attrs["channels"], *x[:, :, ::s, ::s].shape[2:])
            out[:, self._places[index]] = x[:, :, ::s, ::s]
            return out
        if kind == "select":
            return x.index_select(1, self._places[index])
        if kind == "pick":
            (pick,) = self._picks[index]
            return pick(x.reshape(*x.shape[:2], -1)).reshape(*x.shape[:2], *pick.shape)
        if kind == "flatten":
            return x.contiguous().flatten(1)
        return x  # output


_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Values [C] or [C, *space], shaped to be broadcast to x [N, C, *space]."""
    return values.view(1, *values.shape, *(1,) * (x.ndim - 1 - values.ndim))


@dataclass(frozen=True)
class _Pick:
    """Places of the last dimension, on the device that they are picked on."""

    index: Tensor
    shape: torch.Size
    """Of the places, flattened or not."""
    first: int | None
    """Where the places only count up: nothing need be copied."""
    zeros: bool
    """Some are -1."""

    @classmethod
    def of(cls, places: Tensor, behind: int, device: torch.device) -> _Pick:
        """behind: how many places there are to pick from."""
        index = places.flatten()
        first, zeros = int(index[0]), bool((index < 0).any())
        counts_up = in_order(index - first) and not zeros
        index = torch.where(index < 0, behind, index)
        return cls(index.to(device), places.shape, first if counts_up else None, zeros)

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, C, T] to [N, C, places]; zeros for -1."""
        if self.first is not None:
            return x[:, :, self.first : self.first + len(self.index)]
        if self.zeros:
            return F.pad(x, (0, 1)).index_select(2, self.index)  # the last place is zero
        return x.index_select(2, self.index)


def _attend(scale: float, *read: tuple[Tensor, _Pick]) -> Tensor:
    """Softmax attention: queries, keys and values [N, C, *space], each with the channels of its
    heads [heads, D], to [N, heads * D, T]."""

    def heads(x: Tensor, channels: _Pick) -> Tensor:  # [N, heads, T, D]
        part = channels(x.flatten(2).transpose(1, 2))
        return part.unflatten(2, channels.shape).transpose(1, 2)

    q, k, v = (heads(x, channels) for x, channels in read)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2).transpose(1, 2)
