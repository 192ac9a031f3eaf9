"""From a module to operations: every node that ``torch.fx`` recorded becomes an ``Op``, or part of
one.

``walk.py`` goes through the nodes and knows what each tensor holds; the other files say what each
kind of module and function does, in tables of handlers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from onp.errors import UntraceableModel
from onp.suspect.operations import Op
from onp.suspect.recording import record

from . import arithmetic, attention, maps, moves, norms, pointwise, tokens
from .walk import Handlers, Walk

_FILES = (arithmetic, attention, maps, moves, norms, pointwise, tokens)
_HANDLERS = Handlers(
    {kind: handler for file in _FILES for kind, handler in file.MODULES.items()},
    {target: handler for file in _FILES for target, handler in file.FUNCTIONS.items()},
)


@dataclass(frozen=True)
class Program:
    """A network as operations."""

    ops: tuple[Op, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Output shape of each op without the images: (C, H, W), (C, T) or (F,)."""
    counted: frozenset[int]
    """Ops whose channels the code counts."""


def lower(model: nn.Module, image_shape: tuple[int, int, int]) -> Program:
    """The operations of ``model`` (eval mode) on images of ``image_shape`` (C, H, W).

    Raises UntraceableModel, naming the module or function that cannot be handled.
    """
    walk = Walk(record(model, image_shape), _HANDLERS)
    walk.run()
    _refuse_shared_weights(walk.ops)
    return Program(tuple(walk.ops), tuple(walk.op_shapes), frozenset(walk.counted))


def _refuse_shared_weights(ops: Sequence[Op]) -> None:
    seen: set[str] = set()
    for op in ops:
        if op.module and op.module in seen:
            raise UntraceableModel(f"{op.module}: a module that is called twice is not handled")
        seen.update([op.module] if op.module else [])
