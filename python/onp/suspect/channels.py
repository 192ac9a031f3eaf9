"""Which channels of which values must be cut together: residual sums, depthwise convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class TracedOp(Protocol):
    """What ``couple`` reads of an operation (see ``trace.Op``)."""

    @property
    def kind(self) -> str: ...
    @property
    def inputs(self) -> tuple[int, ...]: ...
    @property
    def module(self) -> str | None: ...
    @property
    def attrs(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Channels:
    """Every value's channels, numbered so that coupled channels share a number."""

    of_value: tuple[Tensor, ...]
    """int64 [C] (or [F] after flatten) for each op's output."""
    fixed: frozenset[int]
    """Numbers that must not be cut: image channels, logits, inputs of grouped convolutions."""


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
    ops: Sequence[TracedOp], shapes: Sequence[tuple[int, ...]], model: nn.Module
) -> Channels:
    """Follow every channel through the network; ``shapes`` are the ops' output shapes."""
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
        elif op.kind == "add":
            for one, other in zip(before, values[op.inputs[1]], strict=True):
                sets.join(one, other)
            values.append(before)
        elif op.kind == "flatten":
            span = shape[0] // len(before)
            values.append([channel for channel in before for _ in range(span)])
        elif op.kind == "subsample_pad":
            after = sets.fresh(shape[0])
            positions = op.attrs["positions"]
            assert isinstance(positions, list)
            for channel, position in zip(before, positions, strict=True):
                sets.join(channel, after[position])
            values.append(after)
        else:  # elementwise or pooled: channel for channel
            values.append(before)
            if op.kind in ("output", "affine"):  # an affine's constants belong to the code
                fixed.extend(before)
    return Channels(
        tuple(torch.tensor([sets.find(c) for c in value], dtype=torch.int64) for value in values),
        frozenset(sets.find(channel) for channel in fixed),
    )
