"""A function of CUDA tensors whose forward and backward passes are captured once and replayed.

A step of a probe or of gates is a few hundred small kernels, each of which costs the host more time
to launch than the GPU to run; a CUDA graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onp.ops._gpu_program import captured

Function = Callable[..., tuple[Tensor, ...]]
"""Of tensors or None; must launch the same work for all inputs of one shape."""
WARMUPS = 1
"""Runs before a capture: libraries set themselves up for its stream."""


class Replayed:
    """``function`` at one shape of its inputs; differentiable once by those that required a
    gradient when it was captured."""

    def __init__(self, function: Function, inputs: Sequence[Tensor | None]) -> None:
        """inputs: CUDA tensors or None, an example."""
        self.inputs = [None if one is None else _own(one) for one in inputs]
        sources = [one for one in self.inputs if one is not None and one.requires_grad]
        device = next(one.device for one in inputs if one is not None)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

        def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, sources, self.output_grads)

        with torch.cuda.device(device), torch.enable_grad():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    outputs = function(*self.inputs)
                    self.output_grads = [torch.zeros_like(one) for one in outputs]
                    backward(outputs)
                del outputs
            self.forward_graph, self.outputs = captured(
                lambda: function(*self.inputs), stream, pool
            )
            self.backward_graph, self.grads = captured(lambda: backward(self.outputs), stream, pool)
        self.outputs = tuple(one.detach() for one in self.outputs)
        self.runs = 0
        """Passes so far: the activations are the last one's, and a backward pass uses them up."""

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """What the function gives; the outputs are the caller's own."""
        outputs: tuple[Tensor, ...] = _Call.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return outputs

    def forward(self, inputs: Sequence[Tensor | None]) -> None:
        """Run on these inputs; the result is in ``outputs``."""
        with torch.no_grad():
            for own, given in zip(self.inputs, inputs, strict=True):
                if own is not None and given is not None:
                    _rows(own).copy_(_rows(given))
        self.forward_graph.replay()
        self.runs += 1


def is_one_row(tensor: Tensor) -> bool:
    """Whether a tensor is one row, expanded."""
    return tensor.ndim > 1 and len(tensor) > 1 and tensor.stride(0) == 0


def _rows(tensor: Tensor) -> Tensor:
    """Where its values lie."""
    return tensor.detach()[:1] if is_one_row(tensor) else tensor.detach()


def _own(tensor: Tensor) -> Tensor:
    """A copy, expanded where ``tensor`` is: functions read such a row once."""
    copy = _rows(tensor).clone().expand_as(tensor)
    return copy.detach().requires_grad_(tensor.requires_grad)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replayed: Replayed, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        replayed.forward(inputs)
        ctx.replayed, ctx.run = replayed, replayed.runs
        ctx.save_for_backward(*inputs)
        return tuple(one.clone() for one in replayed.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        replayed: Replayed = ctx.replayed
        if replayed.runs != ctx.run:  # another pass has run since
            replayed.forward(ctx.saved_tensors)
        for own, given in zip(replayed.output_grads, output_grads, strict=True):
            own.copy_(given)
        replayed.backward_graph.replay()
        replayed.runs += 1
        grads = iter(replayed.grads)
        return None, *(
            next(grads).clone() if one is not None and one.requires_grad else None
            for one in replayed.inputs
        )
