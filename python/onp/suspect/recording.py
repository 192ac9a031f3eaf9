"""Run a module once under ``torch.fx``, on a sample of images, and keep what it did.

Every tensor of the sample is a proxy that also holds what it is, so the code's questions about
shapes and types are answered with numbers, and its branches on them are taken. Questions about the
numbers in a tensor are refused, and so is what reads a tensor that was written into since: a graph
of values cannot tell.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from onp.errors import UntraceableModel
from onp.suspect.architectures.resnet import SubsamplePad
from onp.suspect.movement import IMAGES
from onp.suspect.operations import tensor_of


@dataclass(frozen=True)
class Recording:
    """The graph of a module, of the nodes that hold tensors, and what they gave on a sample of
    ``IMAGES`` images. What holds none (a size, say) is a number where it is used."""

    model: nn.Module
    graph: fx.Graph
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    """Of every tensor, without its first dimension (the images)."""
    unchanged: set[fx.Node] = field(default_factory=set)
    """Calls that gave back the very tensor that they were given, as it was."""


_ONE_AT_A_TIME = threading.Lock()
"""fx replaces ``nn.Module.__call__`` of the whole process while it traces."""


def record(model: nn.Module, image_shape: tuple[int, int, int]) -> Recording:
    """Record ``model`` (eval mode) on images of ``image_shape`` (C, H, W).

    Raises UntraceableModel, naming what fx cannot follow.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    size = (IMAGES, *image_shape)
    sample = torch.rand(size, generator=torch.Generator().manual_seed(0))
    tracer = _Tracer(sample.to(parameter.device, parameter.dtype))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with _ONE_AT_A_TIME, torch.no_grad():
            graph = tracer.trace(model)
    except UntraceableModel:
        raise
    except (_DoesNotFit, AssertionError) as error:
        raise UntraceableModel(
            f"{type(model).__name__} does not accept images of shape {image_shape}: "
            f"{_first_line(error)}"
        ) from error
    except Exception as error:  # fx raises many kinds for data-dependent control flow
        raise UntraceableModel(
            f"cannot trace {type(model).__name__}: {_first_line(error)}"
        ) from error
    finally:
        for buffer, before in buffers:  # norms write into theirs without counting it
            if not torch.equal(buffer, before):
                buffer.copy_(before)
    return Recording(model, graph, tracer.shapes, tracer.unchanged)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _DoesNotFit(Exception):
    """An operation failed on the sample."""


class _Known(fx.Proxy):
    """A tensor of the network, or several, and what it is on the sample."""

    sample: Any
    version: int | None
    """How often the tensor had been written into when the code got it; None for several."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.sample, name)
        if isinstance(found, Tensor):  # such as .T
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name) if callable(found) else found

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __len__(self) -> int:
        return len(self.sample)

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self.sample))])


class _Tracer(fx.Tracer):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.unchanged: set[fx.Node] = set()
        self.running = False  # an operation's own code calls modules, too
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, SubsamplePad) or super().is_leaf_module(m, qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self.elsewhere:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return (
            attr_val if self.elsewhere else super().getattr(attr, attr_val, parameter_proxy_cache)
        )

    @property
    def elsewhere(self) -> bool:
        """Whether the code that calls a module is not the code that is recorded: that of an
        operation, or another thread's."""
        return self.running or threading.get_ident() != self.thread

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *options: Any,
        **named: Any,
    ) -> Any:
        """As fx, the proxy of a new node; of one without tensors, which goes, what it holds."""
        proxy = super().create_proxy(kind, target, args, kwargs, *options, **named)
        read = _known_in((args, kwargs))
        for one in read:
            if one.version != _version(one.sample):
                raise UntraceableModel(
                    f"{proxy.node.name}: reads {one.node.name}, which was written into since: "
                    "operations in place cannot be traced there"
                )
        sample = self._on_sample(kind, target, args, kwargs)
        if not _holds_tensors(sample):
            if read and sample is not None and _name_of(target) not in _QUESTIONS:
                raise UntraceableModel(
                    f"{proxy.node.name}: what the code does must not depend on the image, as it "
                    f"may by {_name_of(target)}()"
                )
            self.graph.erase_node(proxy.node)
            return sample
        if isinstance(sample, Tensor):
            self.shapes[proxy.node] = tuple(sample.shape[1:])
            if read and sample is read[0].sample and _version(sample) == read[0].version:
                self.unchanged.add(proxy.node)
        known = _Known(proxy.node, self)
        known.sample, known.version = sample, _version(sample)
        return known

    def _on_sample(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if kind == "placeholder":
            if not self.shapes:
                return self.images
            if not args:
                raise UntraceableModel(f"the network takes a second input, {target}")
            return args[0]  # what the code takes where nothing is given
        args, kwargs = map_aggregate((args, kwargs), _sample_of)
        self.running = True
        try:
            if kind == "get_attr":
                return tensor_of(self.root, target)
            if kind == "call_function":
                return target(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return self.root.get_submodule(target)(*args, **kwargs)
        except Exception as error:  # shapes can fail in many ways
            raise _DoesNotFit(_first_line(error)) from error
        finally:
            self.running = False


_QUESTIONS = frozenset(
    {
        "dim", "element_size", "get_device", "getattr", "getitem", "is_complex", "is_contiguous",
        "is_floating_point", "is_tensor", "ndimension", "nelement", "numel", "size",
        "storage_offset", "stride", "type",
    }
)  # fmt: skip
"""Functions and methods whose answers are the same for every image."""


def _name_of(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _known_in(values: Any) -> list[_Known]:
    found: list[_Known] = []

    def note(value: Any) -> Any:
        if isinstance(value, _Known):
            found.append(value)
        return value

    map_aggregate(values, note)
    return found


def _sample_of(value: Any) -> Any:
    return value.sample if isinstance(value, _Known) else value


def _version(sample: Any) -> int | None:
    """How often a tensor was written into."""
    return sample._version if isinstance(sample, Tensor) else None


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(one, Tensor) for one in value)
    return isinstance(value, Tensor)
