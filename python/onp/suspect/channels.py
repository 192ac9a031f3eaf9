"""Which channels of which values must be cut together: sums, products, depthwise convolutions; and
which must not be cut: those that a layer norm or the code around them counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.suspect.operations import Op


@dataclass(frozen=True)
class Channels:
    """Every value's channels, numbered so that coupled channels share a number."""

    of_value: tuple[Tensor, ...]
    """int64 [C] (or [F] after flatten) for each op's output."""
    fixed: frozenset[int]
    """Numbers that must not be cut: image channels, logits, inputs of grouped convolutions, of
    layer and group norms and of an nn.MultiheadAttention, heads of an attention, channels that code
    takes apart or that a tensor of the model is added to."""
    counted: frozenset[int]
    """Numbers of channels that the code may count, in a reshape: where it asks for their number
    itself they may be cut all the same."""


_COUNTED = ("output", "affine", "parameter", "extend", "layernorm", "groupnorm")
"""Kinds that hold a number for every channel, or average over all of them, and that surgery leaves
as they are."""


class _UnionFind:
    def __init__(self) -> None:
        self.parent: list[int] = []

    def fresh(self, count: int) -> list[int]:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return list(range(first, first + count))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self.parent[max(one, other)] = min(one, other)


def couple(
    ops: Sequence[Op],
    shapes: Sequence[tuple[int, ...]],
    model: nn.Module,
    counted: Iterable[int] = (),
) -> Channels:
    """Follow every channel through the network; ``shapes`` are the ops' output shapes, ``counted``
    those whose channels the code may count."""
    sets = _UnionFind()
    values: list[list[int]] = []
    fixed: list[int] = []
    for op, shape in zip(ops, shapes, strict=True):
        before = values[op.inputs[0]] if op.inputs else []
        if op.kind == "conv":
            conv = model.get_submodule(str(op.module))
            assert isinstance(conv, nn.Conv2d)
            if conv.groups > 1 and conv.groups == conv.in_channels:  # depthwise
                times = conv.out_channels // conv.in_channels
                values.append([channel for channel in before for _ in range(times)])
                continue
            if conv.groups > 1:
                fixed.extend(before)
            values.append(sets.fresh(shape[0]))
            if conv.groups > 1:
                fixed.extend(values[-1])
        elif op.kind in ("linear", "input"):
            values.append(sets.fresh(shape[0]))
            if op.kind == "input":
                fixed.extend(values[-1])
            elif isinstance(model.get_submodule(str(op.module)), nn.MultiheadAttention):
                fixed.extend(before)
        elif op.kind in ("add", "product"):
            for one, other in zip(before, values[op.inputs[1]], strict=True):
                sets.join(one, other)
            values.append(before)
        elif op.kind == "flatten":
            span = shape[0] // len(before)
            values.append([channel for channel in before for _ in range(span)])
        elif op.kind == "subsample_pad":
            after = sets.fresh(shape[0])
            for channel, position in zip(before, op.attrs["positions"], strict=True):
                sets.join(channel, after[position])
            values.append(after)
        elif op.kind == "concat":
            values.append([channel for value in op.inputs for channel in values[value]])
        elif op.kind == "select":  # the code counts channels
            fixed.extend(before)
            values.append([before[channel] for channel in op.attrs["channels"].tolist()])
        elif op.kind == "attention":  # the code splits its channels into heads
            for value in op.inputs:
                fixed.extend(values[value])
            values.append([values[op.inputs[2]][channel] for channel in op.attrs["v"].flatten()])
        else:  # elementwise or pooled: channel for channel
            values.append(before)
            if op.kind in _COUNTED:
                fixed.extend(before)
    return Channels(
        tuple(torch.tensor([sets.find(c) for c in value], dtype=torch.int64) for value in values),
        frozenset(sets.find(channel) for channel in fixed),
        frozenset(sets.find(channel) for op in counted for channel in values[op]),
    )
