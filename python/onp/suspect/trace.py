"""Turn a traceable ``nn.Module`` into operations, sites and groups (types only for now)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Op:
    """One operation of the traced network; ``trace.ops[i].output`` is value ``i``.

    kind: one of
      input                     the images, [N, C, H, W]
      conv, linear              ``module`` is the nn.Conv2d / nn.Linear's qualified name
      norm                      ``module`` is a BatchNorm2d/1d in eval mode (per-channel affine)
      affine                    per-channel scale and shift: attrs["scale"], attrs["shift"] [C]
      relu, relu6               no attrs
      add                       two inputs of the same shape
      maxpool, avgpool          attrs: kernel, stride, padding (int pairs), count_include_pad
      globalpool                mean over H and W, keeps [N, C, 1, 1]
      subsample_pad             option-A shortcut: x[:, :, ::s, ::s] with its channels written to
                                attrs["positions"] (of attrs["channels"]); attrs["stride"]
      flatten                   [N, C, H, W] -> [N, C*H*W]
      output                    reads the logits
    Identity and (eval-mode) dropout are elided.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    module: str | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteLayer:
    """The channels of one value, as one set of consumers reads them.

    Masking a site = zero at its consumers' input. Site numbers of the layer are
    ``start .. start + channels - 1``; layers are numbered in execution order.
    """

    name: str
    """Readable name: the norm's module name, else the producer's or the op's."""
    value: int
    """Op index whose output the consumers read (before pools and flatten)."""
    start: int
    channels: int
    consumers: tuple[int, ...]
    """Op indices of the conv/linear that read the value through pools and flatten only."""
    masked_edges: frozenset[tuple[int, int]]
    """(reader op, input position) pairs that read the *masked* copy of the value; all other
    readers (a residual add, say) read it unmasked."""
    norm: int | None
    """Op index of the norm whose scale and shift can be zeroed to apply a mask: set only if
    everything between the norm and the masked readers is elementwise and read by nothing else."""
    producers: tuple[int, ...]
    """Op indices of the conv/linear whose output channels reach this value one to one without
    passing another conv/linear (several for a residual stream), nearest first."""


@dataclass(frozen=True)
class Trace:
    """What onp knows about one network."""

    ops: tuple[Op, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Output shape of each op without the batch dimension: (C, H, W), or (F,) after flatten."""
    layers: tuple[SiteLayer, ...]
    group_of_site: Tensor
    """int64 [S]: sites with the same number are one coupled channel (design: a group)."""
    num_classes: int

    @property
    def sites(self) -> int:
        """S, the number of sites."""
        return sum(layer.channels for layer in self.layers)


def trace(model: nn.Module, image_shape: tuple[int, int, int]) -> Trace:
    """Trace ``model`` (eval mode) on images of ``image_shape`` (C, H, W)."""
    raise NotImplementedError


_ = torch
