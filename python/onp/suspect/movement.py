"""What code that only moves numbers around did: reshapes, permutations, splits, slices.

There are many ways to write "one token for each patch" or "three times four heads". So such code is
not read but run, on tensors that hold the place of every number instead of the number itself. Where
the places ended up says what the code did.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IMAGES = 2
"""Images in the sample that is traced: enough to see that the code keeps images apart."""

METHODS = frozenset(
    {
        "chunk", "expand", "expand_as", "flatten", "movedim", "permute", "repeat", "reshape",
        "reshape_as", "split", "squeeze", "swapaxes", "transpose", "unbind", "unflatten",
        "unsqueeze", "view", "view_as",
    }
)  # fmt: skip
FUNCTIONS = frozenset(
    {
        getattr, operator.getitem, torch.chunk, torch.flatten, torch.movedim, torch.permute,
        torch.reshape, torch.split, torch.squeeze, torch.swapaxes, torch.transpose, torch.unbind,
        torch.unflatten, torch.unsqueeze,
    }
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """The numbers that a tensor of the network holds: those of one value, or of one tensor of the
    model's own."""

    source: int | str
    """The op that computes the value, or the qualified name of the model's tensor."""
    shape: tuple[int, ...]
    """The source's: (C, *space) for a value; all dimensions for a tensor of the model."""
    last: bool = False
    """The tensor is the whole value with its channels last: [N, *space, C]."""
    moved: Tensor | None = None
    """int64, once code has moved the numbers: the place of each in the flattened source. A value
    counts its ``IMAGES`` images."""
    factor: float = 1.0
    """What code has multiplied them by while a value's channels were apart, as heads are."""

    def places(self) -> Tensor:
        """int64, of the tensor's shape: the place of each number in the flattened source."""
        if self.moved is not None:
            return self.moved
        if isinstance(self.source, str):
            return torch.arange(math.prod(self.shape)).view(self.shape)
        places = torch.arange(IMAGES * math.prod(self.shape)).view(IMAGES, *self.shape)
        return places.movedim(1, -1) if self.last else places

    def after(self, move: Callable[[Tensor], Any]) -> View | tuple[View, ...]:
        """What this tensor is after a move, which may take it apart."""
        moved = move(self.places().contiguous())
        if isinstance(moved, Tensor):
            return replace(self, last=False, moved=moved)
        return tuple(replace(self, last=False, moved=part) for part in moved)


@dataclass(frozen=True)
class Layout:
    """How a moved tensor holds a value."""

    last: bool
    """Channels are the last dimension, not the first behind the images."""
    channels: Tensor
    """int64 [C']: the value's channels that it holds."""
    positions: Tensor
    """int64 [*space]: the positions of the value's flattened space that it holds of each."""
    flat: bool
    """Channels and positions are flattened to features, channels first."""


def layout(view: View) -> Layout | None:
    """How the tensor holds its value: as [N, C', *space], [N, *space, C'] or [N, F], the same
    positions of each channel; None: otherwise."""
    at = _of_each_image(view)
    if at is None or at.ndim == 0:
        return None
    size = math.prod(view.shape[1:])
    held = int((at // size == at.flatten()[0] // size).flatten().cumprod(0).sum())  # of a channel
    flat = at.ndim == 1 and len(view.shape) > 1 and (held > 1 or size == 1)
    if flat:
        if len(at) % held:
            return None
        at = at.view(-1, held)
    for last in (False,) if flat else (False, True):
        by_channel = at.movedim(-1, 0) if last else at
        channels = by_channel.flatten(1)[:, 0] // size if at.ndim > 1 else at // size
        positions = by_channel[0] - channels[0] * size
        starts = channels.view(-1, *(1,) * (at.ndim - 1)) * size
        if bool((positions < size).all()) and torch.equal(by_channel, starts + positions):
            return Layout(last, channels, positions, flat)
    return None


def in_order(positions: Tensor) -> bool:
    """The positions are 0, 1, 2 ... read row by row."""
    return torch.equal(positions.flatten(), torch.arange(positions.numel()))


def head_channels(view: View) -> Tensor | None:
    """int64 [heads, D]: the channels that a tensor [N, heads, T, D] (or [N, T, D]) holds of a value
    with T positions in their order; None if it holds something else."""
    at = _of_each_image(view)
    positions = math.prod(view.shape[1:])
    if at is None or at.ndim not in (2, 3) or at.shape[-2] != positions:
        return None
    at = at.view(-1, *at.shape[-2:])  # [heads, T, D]
    channels = at[:, 0] // positions
    expected = channels[:, None] * positions + torch.arange(positions)[:, None]
    return channels if torch.equal(at, expected) else None


@dataclass(frozen=True)
class Scores:
    """What queries times keys gives in code that spells an attention out, [N, heads, T, T']."""

    query: View
    key: View
    """As [N, heads, T', D]."""
    scale: float
    """Of the scores so far."""
    softmaxed: bool = False


def scores(query: View, key: View) -> Scores | None:
    """The product of [N, heads, T, D] and [N, heads, D, T']; None if they hold something else."""
    turned = key.after(lambda places: places.transpose(-1, -2))
    assert isinstance(turned, View)
    if head_channels(query) is None or head_channels(turned) is None:
        return None
    return Scores(query, turned, query.factor * key.factor)


def constant_layout(view: View, shape: tuple[int, ...], last: bool) -> Tensor | None:
    """Which elements of a tensor of the model meet a tensor of ``shape`` [N, C, *space] (``last``:
    [N, *space, C]) when they are broadcast: int64 [C, *space], or [C] where all positions meet the
    same. None: they differ between images, or do not fit."""
    try:
        at = view.places().expand(shape)
    except RuntimeError:
        return None
    if not torch.equal(at[0], at[-1]):
        return None
    index = at[0].movedim(-1, 0) if last else at[0]
    flat = index.flatten(1) if index.ndim > 1 else index[:, None]
    return flat[:, 0].clone() if bool((flat == flat[:, :1]).all()) else index.contiguous()


def _of_each_image(view: View) -> Tensor | None:
    """The places in the first image's value, if every image holds its own in the same way."""
    places = view.places()
    size = math.prod(view.shape)
    if places.ndim == 0 or places.shape[0] != IMAGES:
        return None
    return places[0] if torch.equal(places[1], places[0] + size) else None
