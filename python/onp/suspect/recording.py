"""Run a module once under ``torch.fx`` and keep what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from onp.errors import UntraceableModel
from onp.suspect.architectures.resnet import SubsamplePad
from onp.suspect.movement import IMAGES


@dataclass(frozen=True)
class Recording:
    """The graph of a module, and what its nodes gave on a sample of ``IMAGES`` images."""

    model: nn.Module
    graph: fx.Graph
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    """Of every tensor, without its first dimension (the images)."""
    sizes: dict[fx.Node, Any] = field(default_factory=dict)
    """Results that hold no tensor: sizes, and what the code computes from them."""


def record(model: nn.Module, image_shape: tuple[int, int, int]) -> Recording:
    """Record ``model`` (eval mode) on images of ``image_shape`` (C, H, W).

    Raises UntraceableModel, naming what fx cannot follow.
    """
    try:
        recording = Recording(model, _Tracer().trace(model))
    except UntraceableModel:
        raise
    except Exception as error:  # fx raises many kinds for data-dependent control flow
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UntraceableModel(f"cannot trace {type(model).__name__}: {reason}") from error
    parameter = next(model.parameters(), torch.zeros(()))
    sample = torch.zeros(IMAGES, *image_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad():
            _Recorder(recording).run(sample)
    except Exception as error:  # shapes can fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UntraceableModel(
            f"{type(model).__name__} does not accept images of shape {image_shape}: {reason}"
        ) from error
    return recording


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, SubsamplePad) or super().is_leaf_module(m, qualified_name)


class _Recorder(fx.Interpreter):
    def __init__(self, recording: Recording) -> None:
        super().__init__(recording.model, graph=recording.graph)
        self.recording = recording

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.recording.shapes[n] = tuple(value.shape[1:])
        elif not (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value)):
            self.recording.sizes[n] = value
        return value
