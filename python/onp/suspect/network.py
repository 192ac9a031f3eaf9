"""The traced network as a frozen function of images and site gates: norms folded, NHWC inside.

One executor serves the torch backend of mask evaluation, the probes (gradients with respect to
the images) and the activation statistics. It holds its own copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.suspect.trace import SiteLayer, Trace


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

    torch 2.13's CPU convolutions abort the process on channels-last weight gradients of layers
    narrower than 8 channels (seen for 1 to 7, not from 8 on; image inputs are unaffected).
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    wide = all(
        conv.out_channels >= 8 and (conv.in_channels >= 8 or conv.in_channels <= 3)
        for conv in convolutions
    )
    return torch.channels_last if wide else torch.contiguous_format


class FrozenNetwork:
    """Evaluates a trace with weights taken from ``model`` when built; float32."""

    def __init__(self, trace: Trace, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self.trace = trace
        self.device = torch.device(device)
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
        with torch.no_grad():
            for index, op in enumerate(trace.ops):
                if op.kind in ("conv", "linear"):
                    self._read_weights(index, model.get_submodule(str(op.module)))
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

    def _read_weights(self, index: int, module: nn.Module) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        weight = module.weight.detach().to(self.device, torch.float32, copy=True)
        if isinstance(module, nn.Conv2d):
            weight = weight.contiguous(memory_format=torch.channels_last)
            self._convs[index] = module
        bias = module.bias
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
    ) -> Tensor:
        """Logits float32 [N, K] of images float32 [N, C, H, W].

        gates: [S] or [N, S] factors on the sites (0 prunes). observe: called with each site layer
        and its activations, [N, C, H, W] or [N, C], before the gate.
        """
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
            layer = self._layer_at.get(index)
            if layer is not None:
                x = values[index]
                if observe is not None:
                    observe(layer, x)
                if gates is not None:
                    gate = gates[..., layer.sites].to(x.device)
                    masked[index] = x * gate.reshape(-1, layer.channels, *(1,) * (x.ndim - 2))
        return values[len(ops) - 1]

    def _step(self, index: int, kind: str, inputs: list[Tensor], images: Tensor) -> Tensor:
        attrs = self.trace.ops[index].attrs
        if kind == "input":
            return images.to(self.device).contiguous(memory_format=torch.channels_last)
        x = inputs[0]
        if kind == "conv":
            conv = self._convs[index]
            weight, bias = self._weights[index]
            assert not isinstance(conv.padding, str)
            return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if kind == "linear":
            return F.linear(x, *self._weights[index])
        if kind in ("norm", "affine"):
            if index in self._alias:
                return x
            affine = self._affines[index]
            view = (1, -1) + (1,) * (x.ndim - 2)
            return x * affine.scale.view(view) + affine.shift.view(view)
        if kind == "relu":
            return F.relu(x)
        if kind == "relu6":
            return F.relu6(x)
        if kind == "add":
            return x + inputs[1]
        if kind == "maxpool":
            return F.max_pool2d(x, attrs["kernel"], attrs["stride"], attrs["padding"])
        if kind == "avgpool":
            return F.avg_pool2d(
                x, attrs["kernel"], attrs["stride"], attrs["padding"],
                count_include_pad=attrs["count_include_pad"],
            )  # fmt: skip
        if kind == "globalpool":
            return x.mean((2, 3), keepdim=True)
        if kind == "subsample_pad":
            s = attrs["stride"]
            out = x.new_zeros(x.shape[0], attrs["channels"], *x[:, :, ::s, ::s].shape[2:])
            out[:, attrs["positions"]] = x[:, :, ::s, ::s]
            return out
        if kind == "flatten":
            return x.contiguous().flatten(1)
        return x  # output
