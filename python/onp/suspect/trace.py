"""Turn a traceable ``nn.Module`` into operations, sites and groups.

Pairing of convolutions, norms and activations comes from the operations' graph alone, never from
module order or names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.errors import UntraceableModel
from onp.suspect.channels import Channels, couple
from onp.suspect.lowering import lower
from onp.suspect.operations import ACTIVATIONS, KEEP_ZERO, NORMS, TRANSPARENT, WEIGHTED, Op


@dataclass(frozen=True)
class SiteLayer:
    """The channels of one value, as one set of consumers reads them.

    Masking a site = zero at its consumers' input. Site numbers of the layer are
    ``start .. start + channels - 1``; layers are numbered in execution order.
    """

    name: str
    """Readable name: the norm's module name, else the nearest producer's."""
    value: int
    """Op index whose output the consumers read (before pools, picks and flatten)."""
    start: int
    channels: int
    consumers: tuple[int, ...]
    """Op indices of the conv/linear that read the value through pools, picked places and flatten
    only."""
    masked_edges: frozenset[tuple[int, int]]
    """(reader op, input position) pairs that read the *masked* copy of the value; all other
    readers (a residual add, say) read it unmasked."""
    norm: int | None
    """Op index of the norm whose scale and shift can be zeroed to apply a mask: set only if
    everything between the norm and the masked readers keeps zeros and is read by nothing else."""
    producers: tuple[int, ...]
    """Op indices of the conv/linear whose output channels reach this value without passing another
    conv/linear, nearest first: several for a residual stream or a concatenation. Channel for
    channel, as ``Trace.channels`` numbers them."""

    @property
    def sites(self) -> slice:
        """The layer's site numbers."""
        return slice(self.start, self.start + self.channels)


@dataclass(frozen=True)
class Trace:
    """What onp knows about one network."""

    ops: tuple[Op, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Output shape of each op without the batch dimension: (C, H, W), tokens (C, T) or (F,)."""
    layers: tuple[SiteLayer, ...]
    channels: Channels
    """Which channels of which values are coupled (sums, products, depthwise convolutions)."""
    group_of_site: Tensor
    """int64 [S]: sites with the same number are one coupled channel (a group)."""
    num_classes: int

    @property
    def sites(self) -> int:
        """S, the number of sites."""
        return int(self.group_of_site.shape[0])

    def consumer_span(self, layer: SiteLayer, consumer: int) -> int:
        """Input features of ``consumer`` a channel of ``layer`` feeds: H*W after a flatten."""
        fed = self.shapes[self.ops[consumer].inputs[0]][0]
        return fed // layer.channels


def trace(model: nn.Module, image_shape: tuple[int, int, int]) -> Trace:
    """Trace ``model`` on images of ``image_shape`` (C, H, W).

    The model must be in eval mode; what it computes is not changed (a tensor that its code makes
    of its own becomes an attribute, ``_tensor_constant0`` and so on). Raises UntraceableModel,
    naming the module or function that cannot be handled.
    """
    program = lower(model, image_shape)
    ops, shapes = program.ops, program.shapes
    channels = couple(ops, shapes, model, program.counted)
    layers = _site_layers(ops, shapes, _readers(ops))
    if not layers:
        raise UntraceableModel(f"{type(model).__name__} has no prunable channels")
    raw = torch.cat([channels.of_value[layer.value] for layer in layers])
    groups = raw.unique(return_inverse=True)[1]
    classes = shapes[ops[-1].inputs[0]][0]
    return Trace(ops, shapes, tuple(layers), channels, groups, classes)


# ---- sites --------------------------------------------------------------------------------------


def _readers(ops: Sequence[Op]) -> list[list[tuple[int, int]]]:
    """(reader, input position) pairs of every value."""
    readers: list[list[tuple[int, int]]] = [[] for _ in ops]
    for index, op in enumerate(ops):
        for position, value in enumerate(op.inputs):
            readers[value].append((index, position))
    return readers


def _site_layers(
    ops: Sequence[Op], shapes: tuple[tuple[int, ...], ...], readers: list[list[tuple[int, int]]]
) -> list[SiteLayer]:
    pure: dict[int, bool] = {}  # values read by conv/linear alone, through pools and flatten
    for value in range(len(ops) - 1, -1, -1):
        pure[value] = bool(readers[value]) and all(
            ops[reader].kind in WEIGHTED or (ops[reader].kind in TRANSPARENT and pure[reader])
            for reader, _ in readers[value]
        )
    consumers: dict[int, list[int]] = {}
    edges: dict[int, set[tuple[int, int]]] = {}
    for index, op in enumerate(ops):
        if op.kind not in WEIGHTED:
            continue
        edge, root = (index, 0), op.inputs[0]
        while ops[root].kind in TRANSPARENT and pure[root]:
            edge, root = (root, 0), ops[root].inputs[0]
        consumers.setdefault(root, []).append(index)
        edges.setdefault(root, set()).add(edge)

    layers: list[SiteLayer] = []
    start = 0
    for root in sorted(consumers):
        producers = _producers(ops, shapes, root)
        if not producers:
            continue  # the image's own channels
        all_masked = all(edge in edges[root] for edge in readers[root])
        norm = _owned_norm(ops, readers, root) if all_masked else None
        names = ops if norm is None else [ops[norm]]
        name = names[0].module if norm is not None else _readable(ops, root, producers)
        channels = shapes[root][0]
        layers.append(
            SiteLayer(
                str(name),
                root,
                start,
                channels,
                tuple(consumers[root]),
                frozenset(edges[root]),
                norm,
                producers,
            )
        )
        start += channels
    return layers


def _readable(ops: Sequence[Op], root: int, producers: tuple[int, ...]) -> str:
    """The site's name where no norm is its own: the norm just before it, or its producer."""
    value = root
    while ops[value].kind in ACTIVATIONS:
        value = ops[value].inputs[0]
    if ops[value].kind in NORMS and ops[value].module is not None:
        return str(ops[value].module)
    return f"{ops[producers[0]].module}:out"


def _producers(
    ops: Sequence[Op], shapes: tuple[tuple[int, ...], ...], root: int
) -> tuple[int, ...]:
    found: set[int] = set()
    stack, seen = [root], set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if ops[value].kind in WEIGHTED:
            found.add(value)
        elif ops[value].kind == "attention":  # queries and keys only weigh the values' tokens
            stack.append(ops[value].inputs[2])
        elif ops[value].kind == "product":  # a number a channel only weighs the map
            map_, factor = ops[value].inputs
            stack.extend([map_] if shapes[map_] != shapes[factor] else [map_, factor])
        else:
            stack.extend(ops[value].inputs)
    return tuple(sorted(found, reverse=True))


def _owned_norm(ops: Sequence[Op], readers: list[list[tuple[int, int]]], root: int) -> int | None:
    value = root
    while ops[value].kind in KEEP_ZERO:
        value = ops[value].inputs[0]
        if len(readers[value]) != 1:
            return None
    owned = ops[value].kind in NORMS and ops[value].module is not None
    return value if owned else None
