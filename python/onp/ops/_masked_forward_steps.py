"""The program of a masked forward: steps over buffers.

A step is one convolution (a linear layer is one too), pool, copy, concatenation, norm,
attention or product, and as many of the elementwise operations behind it as its epilogue holds, in
this order:

    t = operation(input) + bias + residual;  t = first(t);               plain = t
    t = t * scale + shift;  t = second(t);  t = 0 at pruned channels;    final = t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onp import _C
from onp.errors import UnsupportedOperation

Pair = tuple[int, int]

NONE = -1
CONVOLUTION, MAX_POOL, AVERAGE_POOL, PICK, CONCATENATION = range(5)
LAYER_NORM, ATTENTION, PRODUCT, GROUP_NORM = range(5, 9)
ACTIVATIONS = {"relu": 1, "relu6": 2, "silu": 5, "sigmoid": 6, "hardsigmoid": 7, "hardswish": 8}
GELU = {"none": 3, "tanh": 4}

# How far a step's epilogue is filled: what was absorbed last.
RESULT, RESIDUAL, FIRST, PLAIN, SCALE, SECOND = range(6)


@dataclass
class Step:
    """One step; its arrays are float64, and folded into each other as far as they go."""

    name: str
    """Of the operation that opens it."""
    kind: int
    input: int
    channels: int
    others: tuple[int, ...] = ()
    """Further buffers read: of a concatenation or product, or an attention's keys and values."""
    index: tuple[int, ...] = ()
    """Pixels picked, -1 for zeros; or channels [3, heads, D] of queries, keys and values."""
    heads: int = 0
    """Of an attention; or a group norm's groups."""
    value: float = 0.0
    """A norm's epsilon, or the factor of an attention's scores."""
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    groups: int = 1
    count_include_pad: bool = True
    ceil_mode: bool = False
    """The buffers' sizes say it, too."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: int = NONE
    first: int = 0
    plain: int = NONE
    scale: Tensor | None = None
    shift: Tensor | None = None
    second: int = 0
    site_start: int = NONE
    final: int = NONE
    stage: int = RESULT
    result_norm: int = NONE
    """Op index of the norm whose output the operation itself yields,"""
    scaled_norm: int = NONE
    """and of the one whose output is ``t * scale + shift``."""

    @property
    def operands(self) -> tuple[int, ...]:
        """The buffers that the operation itself reads."""
        return (self.input, *self.others)

    def absorb_affine(self, scale: Tensor, shift: Tensor, norm: int) -> bool:
        """Take in ``t * scale + shift`` if the epilogue still has room for it. norm: its op index
        if it is one. The output of a norm with another affine behind it is lost."""
        if self.stage == RESULT and self.weight is not None:
            bias = torch.zeros_like(shift) if self.bias is None else self.bias
            self.weight = self.weight * scale.view(-1, 1, 1, 1)
            self.bias = bias * scale + shift
            self.result_norm = norm
            return True
        if self.stage > SCALE:
            return False
        if self.scale is None or self.shift is None:
            self.scale, self.shift = scale, shift
        else:
            self.scale, self.shift = self.scale * scale, self.shift * scale + shift
        self.scaled_norm = norm
        self.stage = SCALE
        return True

    def absorb_activation(self, activation: int) -> bool:
        """Take in an activation if the epilogue still has room for it."""
        if self.stage < FIRST:
            self.first, self.stage = activation, FIRST
        elif self.stage < SECOND:
            self.second, self.stage = activation, SECOND
        else:
            return False
        return True

    def absorb_residual(self, buffer: int) -> bool:
        """Take in the sum with a buffer if the epilogue still has room for it."""
        if self.stage >= RESIDUAL:
            return False
        self.residual, self.stage = buffer, RESIDUAL
        return True

    def native(self) -> tuple[_C.MaskedForwardStep, list[Tensor]]:
        """The native step, and the float32 arrays that must live until the plan is built."""
        arrays: list[Tensor] = []

        def address(values: Tensor | None) -> int:
            if values is None:
                return 0
            arrays.append(values.to("cpu", torch.float32).contiguous())
            return arrays[-1].data_ptr()

        step = _C.MaskedForwardStep(
            kind=self.kind,
            input=self.input,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            count_include_pad=self.count_include_pad,
            others=list(self.others),
            index=list(self.index),
            heads=self.heads,
            value=self.value,
            weight=address(self.weight),
            bias=address(self.bias),
            residual=self.residual,
            first=self.first,
            plain=self.plain,
            scale=address(self.scale),
            shift=address(self.shift),
            second=self.second,
            site_start=self.site_start,
            final=self.final,
        )
        return step, arrays


@dataclass(frozen=True)
class Program:
    """What a plan is built from."""

    buffers: list[tuple[int, int, int]]
    """(C, H, W) of each; buffer 0 holds the images."""
    steps: list[Step]
    constants: dict[int, Tensor]
    """Buffers that no step writes, float64 [C, H, W]."""
    output: int

    def native(
        self,
    ) -> tuple[list[_C.MaskedForwardStep], list[tuple[int, int]], list[Tensor]]:
        """The native steps, the constants' buffers and addresses, and the arrays that must live
        until the native plan is built."""
        pairs = [step.native() for step in self.steps]
        arrays = [array for _, own in pairs for array in own]
        constants = []
        for buffer, values in self.constants.items():
            arrays.append(values.to("cpu", torch.float32).contiguous())
            constants.append((buffer, arrays[-1].data_ptr()))
        return [step for step, _ in pairs], constants, arrays

    def check_convolutional(self, user: str) -> None:
        """For a GPU, which has convolutions, pools and concatenations, with ReLU and ReLU6 alone.
        Raises UnsupportedOperation."""
        for step in self.steps:
            smooth = max(step.first, step.second) > ACTIVATIONS["relu6"]
            known = step.kind <= AVERAGE_POOL or step.kind == CONCATENATION
            if not known or smooth or step.residual in self.constants:
                raise UnsupportedOperation(
                    f"{user}: {step.name} must be a convolution, linear layer, pool, sum or "
                    "concatenation, with ReLU or ReLU6 behind it"
                )

    @property
    def norms(self) -> list[Pair]:
        """Of each step, the op indices of the norms whose outputs are its operation's result and
        its scaled value; -1: none."""
        return [(step.result_norm, step.scaled_norm) for step in self.steps]
