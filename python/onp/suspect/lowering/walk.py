"""One pass over a recorded graph: what each tensor holds, and the operations written so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn

from onp.errors import UntraceableModel
from onp.suspect import movement
from onp.suspect.movement import Scores, View
from onp.suspect.operations import Op, tensor_of
from onp.suspect.recording import Recording

FunctionHandler = Callable[["Walk", fx.Node], None]
ModuleHandler = Callable[["Walk", fx.Node, str, Any], None]
"""Of a module and its qualified name."""


@dataclass(frozen=True)
class Handlers:
    """What writes the operations of each kind of module, and of each function or method's name."""

    modules: dict[type[nn.Module], ModuleHandler]
    functions: dict[Any, FunctionHandler]


class Walk:
    """Walks the fx graph once and writes the operations."""

    def __init__(self, recording: Recording, handlers: Handlers) -> None:
        self.model = recording.model
        self.shapes = recording.shapes
        """Of every node's tensor, without the images."""
        self.ops: list[Op] = []
        self.op_shapes: list[tuple[int, ...]] = []
        self.views: dict[fx.Node, View | Scores | tuple[View | None, ...] | None] = {}
        """What every node's tensor holds; None: nothing that is handled."""
        self.counted: set[int] = set()
        """Ops whose channels the code counts: with fewer it would do something else, or fail."""
        self._recording, self._handlers = recording, handlers

    def run(self) -> None:
        for node in self._recording.graph.nodes:
            try:
                getattr(self, f"_{node.op}")(node)
            except UntraceableModel:
                raise
            except Exception as error:  # a form of a call that no handler knows
                refuse(node, f"is not understood: {type(error).__name__}: {error}")

    # ---- what handlers read and write

    def emit(
        self,
        kind: str,
        node: fx.Node,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        last: bool = False,
        module: str | None = None,
        attrs: dict[str, Any] | None = None,
    ) -> int:
        """Write an op whose value, of ``shape``, is what ``node`` holds from here on."""
        self.ops.append(Op(kind, node.name, inputs, module, attrs or {}))
        self.op_shapes.append(shape)
        self.views[node] = View(len(self.ops) - 1, shape, last)
        return len(self.ops) - 1

    def emit_like(
        self,
        kind: str,
        node: fx.Node,
        attrs: dict[str, Any] | None = None,
        module: str | None = None,
    ) -> None:
        """Write an op of what the node reads first, wherever its channels are."""
        value, last = self.read(node, source_of(node))
        self.emit(kind, node, (value,), self.op_shapes[value], last, module, attrs)

    def emit_on_map(
        self, kind: str, node: fx.Node, module: str | None, attrs: dict[str, Any] | None = None
    ) -> None:
        """Write an op of what the node reads first, whose channels come first."""
        value = self.read_first(node, source_of(node))
        self.emit(kind, node, (value,), self.shapes[node], module=module, attrs=attrs)

    def keep(self, node: fx.Node) -> None:
        """The node holds what it reads first."""
        source = source_of(node)
        held = self.views.get(source) if isinstance(source, fx.Node) else None
        self.views[node] = held if isinstance(held, Scores) else self.view(node, source)

    def view(self, node: fx.Node, argument: Any) -> View:
        view = self.views.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(view, View):
            refuse(node, f"reads {argument}, which is no image value")
        return view

    def is_value(self, argument: Any) -> bool:
        view = self.views.get(argument) if isinstance(argument, fx.Node) else None
        return isinstance(view, View) and isinstance(view.source, int)

    def read(self, node: fx.Node, argument: Any) -> tuple[int, bool]:
        """The op whose value ``argument`` is, and whether the module's code has its channels last.

        Moves that changed the value's shape become operations here.
        """
        view = self.view(node, argument)
        if not isinstance(view.source, int):
            refuse(node, f"reads {argument}, which is no image value")
        if view.moved is None:
            return view.source, view.last
        found = movement.layout(view) if view.factor == 1 else None
        if found is None:
            refuse(node, f"reads {argument}, which takes channels apart or mixes them")
        source, shape, positions = view.source, view.shape, found.positions
        if len(found.channels) != shape[0] or not movement.in_order(found.channels):
            shape = (len(found.channels), *shape[1:])
            attrs = {"channels": found.channels}
            source = self.emit("select", argument, (source,), shape, attrs=attrs)
        whole = positions.numel() == math.prod(shape[1:]) and movement.in_order(positions)
        if not whole or (positions.shape != shape[1:] and not found.flat):
            shape, attrs = (shape[0], *positions.shape), {"positions": positions}
            source = self.emit("pick", argument, (source,), shape, found.last, attrs=attrs)
        self.views[argument] = View(source, shape, found.last)
        if found.flat:
            self.emit("flatten", argument, (source,), (math.prod(shape),))
        return self.read(node, argument)

    def read_first(self, node: fx.Node, argument: Any) -> int:
        """The op of a value whose channels come first in the module's code too."""
        value, last = self.read(node, argument)
        if last and len(self.op_shapes[value]) > 1:
            refuse(node, "must read its channels first, [N, C, H, W]")
        return value

    def read_last(self, node: fx.Node, argument: Any) -> tuple[int, bool]:
        """The op of a value whose channels come last: features, tokens or pixels."""
        value, last = self.read(node, argument)
        if not last and len(self.op_shapes[value]) > 1:
            refuse(node, "must read its channels last, [N, features] or [N, tokens, features]")
        return value, last

    def by_channel(self, node: fx.Node, last: bool) -> tuple[int, ...]:
        """The shape of the node's tensor with the channels first."""
        shape = self.shapes[node]
        return (shape[-1], *shape[:-1]) if last else shape

    # ---- kinds of nodes

    def _placeholder(self, node: fx.Node) -> None:
        self.emit("input", node, (), self.shapes[node])

    def _output(self, node: fx.Node) -> None:
        logits = node.args[0]
        if not isinstance(logits, fx.Node) or len(self.shapes.get(logits, ())) != 1:
            raise UntraceableModel("the network must return one tensor of logits [N, classes]")
        self.emit("output", node, (self.read_first(node, logits),), self.shapes[logits])

    def _get_attr(self, node: fx.Node) -> None:
        """A tensor of the model; it becomes part of the operation that reads it."""
        name = str(node.target)
        self.views[node] = View(name, tuple(tensor_of(self.model, name).shape))

    def _call_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.model.get_submodule(name)
        known = (kind for kind in type(module).__mro__ if kind in self._handlers.modules)
        kind = next(known, None)
        if kind is not None:
            self._handlers.modules[kind](self, node, name, module)
        elif node in self._recording.unchanged:
            self.keep(node)
        else:
            raise UntraceableModel(
                f"{name}: modules of type {type(module).__name__} are not handled yet"
            )

    def _call_function(self, node: fx.Node) -> None:
        self._call(node, f"the function {getattr(node.target, '__name__', node.target)}")

    def _call_method(self, node: fx.Node) -> None:
        self._call(node, f"the method .{node.target}()")

    def _call(self, node: fx.Node, named: str) -> None:
        handler = self._handlers.functions.get(node.target)
        if handler is not None:
            handler(self, node)
        elif node in self._recording.unchanged:
            self.keep(node)
        else:
            refuse(node, f"{named} is not handled yet")


def refuse(node: fx.Node, reason: str) -> NoReturn:
    raise UntraceableModel(f"{node.name}: {reason}")


def source_of(node: fx.Node) -> Any:
    """The tensor that a node works on: its first argument."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def argument_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return default if value is None else value


def other_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The positional ones and those by name, without the tensor that the node works on."""
    source = source_of(node)
    named = {key: value for key, value in node.kwargs.items() if value is not source}
    return [one for one in node.args if one is not source], named


def run_on(target: Any, tensor: torch.Tensor, arguments: list[Any], named: dict[str, Any]) -> Any:
    """A function, or the tensor's method of that name, on other numbers than the recorded."""
    run = getattr(torch.Tensor, target) if isinstance(target, str) else target
    return run(tensor, *arguments, **named)
