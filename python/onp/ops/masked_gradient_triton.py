"""Triton kernels of the masked gradient: an epilogue taken back, alone and behind a convolution.

Under ``TRITON_INTERPRET=1`` they run on CPU tensors, as those of ``masked_forward_triton``.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from onp.ops.masked_forward_triton import (
    EPILOGUE_BLOCK,
    INTERPRETED,
    Convolution,
    _rounded,
    check_device,
    convolved,
)

PIXELS, CHANNELS = 32, 64
"""Of one step of ``gate_gradient_kernel``."""


@dataclass(frozen=True)
class Moments:
    """The gradient by a norm's output v, of those by its moments: v * slope + offset."""

    values: Tensor
    """v, float32 [I, H, W, C]."""
    slope: Tensor
    """float32 [I, U], as is offset;"""
    offset: Tensor
    start: int
    """the norm's first column in them."""
    units: int
    """Channels of the norm; those stored beyond have no part in it."""


@dataclass(frozen=True)
class Reverse:
    """An epilogue taken back (see ``_masked_forward_steps``): from the gradient by what it wrote to
    that by its operation's result. Maps are float32 [I, H, W, C]."""

    other: Tensor | None
    """Gradient by ``final``, beside the one that is given;"""
    plain: Tensor | None
    """and by ``plain``."""
    second: int
    """Activation: 0 none, 1 ReLU, 2 ReLU6."""
    active: Tensor | None
    """Its result: before the gates."""
    gates: Tensor | None
    """float32 [B, S + ...]: factors on the sites, a row for ``per_mask`` images."""
    site_start: int
    per_mask: int
    scaled: Moments | None
    scale: Tensor | None
    """float32 [C]"""
    first: int
    passed: Tensor | None
    """What the first activation gave."""
    result: Moments | None
    ungated: Tensor | None
    """Where the gradient by the gated value is written,"""
    flow: Tensor | None
    """that by the residual,"""
    out: Tensor
    """and that by the operation's result; rounded to TF32 if a convolution reads it."""
    tf32: bool

    @classmethod
    def nothing(cls, out: Tensor) -> Reverse:
        """No epilogue: the gradient as it is."""
        none = dict.fromkeys(
            ("other", "plain", "active", "gates", "scaled", "scale", "passed", "result",
             "ungated", "flow")
        )  # fmt: skip
        return cls(**none, second=0, site_start=0, per_mask=1, first=0, out=out, tf32=False)

    def with_flows(self, other: Tensor | None, plain: Tensor | None) -> Reverse:
        """With gradients by ``final`` and by ``plain``."""
        return replace(self, other=other, plain=plain)


@triton.jit
def _passed(t, values, KIND: tl.constexpr):
    """The gradient through an activation that gave ``values``."""
    t = tl.where(values > 0, t, 0.0)
    if KIND == 2:
        t = tl.where(values < 6, t, 0.0)
    return t


@triton.jit
def _read(where, row, o0, place, inside, TILED: tl.constexpr):
    """A tile of a map: by its descriptor, at (row, o0), or by its pointer."""
    if TILED:
        values = where.load([row, o0])
    else:
        values = tl.load(where + place, mask=inside, other=0.0)
    return values


@triton.jit
def _write(where, t, row, o0, place, inside, TILED: tl.constexpr):
    if TILED:
        where.store([row, o0], t)
    else:
        tl.store(where + place, t, mask=inside)


@triton.jit
def _by_image(values, image, stride, column, valid, ONE_IMAGE: tl.constexpr):
    """Values of each pixel's image [M, O], or [1, O] where the tile is of one; 0 where not valid.

    image: int32 [M], or of the one. column, valid: [O]."""
    if ONE_IMAGE:
        found = tl.load(values + image * stride + column, mask=valid, other=0.0)[None, :]
    else:
        at = (image * stride)[:, None] + column[None, :]
        found = tl.load(values + at, mask=valid[None, :], other=0.0)
    return found


@triton.jit
def _taken_back(
    t,  # [M, O]
    row, o0,  # where its tile lies in maps, if TILED,
    place, inside,  # [M, O]; or where its values do, else
    image,  # int32 [M], or one
    o,  # [O]: channels
    valid,  # [O]
    other, plain, active, passed,  # maps
    gates, gate_stride, site_start, per_mask,
    scaled, scaled_slope, scaled_offset, scaled_start, scaled_units,
    scale,
    result, result_slope, result_offset, result_start, result_units,
    moments_stride,
    ungated, flow, out,  # maps
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TF32: tl.constexpr,
    ONE_MASK: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    if other is not None:
        t += _read(other, row, o0, place, inside, TILED)
    if ungated is not None:  # before the activation, which is before the gates
        _write(ungated, t, row, o0, place, inside, TILED)
    if SECOND > 0:
        t = _passed(t, _read(active, row, o0, place, inside, TILED), SECOND)
    if gates is not None:
        if ONE_MASK:
            t *= tl.load(gates + site_start + o, mask=valid, other=0.0)[None, :]
        else:
            column = site_start + o
            t *= _by_image(gates, image // per_mask, gate_stride, column, valid, ONE_IMAGE)
    if scaled is not None:
        there, column = valid & (o < scaled_units), scaled_start + o
        values = _read(scaled, row, o0, place, inside, TILED)
        t += values * _by_image(scaled_slope, image, moments_stride, column, there, ONE_IMAGE)
        t += _by_image(scaled_offset, image, moments_stride, column, there, ONE_IMAGE)
    if scale is not None:
        t *= tl.load(scale + o, mask=valid, other=0.0)[None, :]
    if plain is not None:
        t += _read(plain, row, o0, place, inside, TILED)
    if FIRST > 0:
        t = _passed(t, _read(passed, row, o0, place, inside, TILED), FIRST)
    if flow is not None:
        _write(flow, t, row, o0, place, inside, TILED)
    if result is not None:
        there, column = valid & (o < result_units), result_start + o
        values = _read(result, row, o0, place, inside, TILED)
        t += values * _by_image(result_slope, image, moments_stride, column, there, ONE_IMAGE)
        t += _by_image(result_offset, image, moments_stride, column, there, ONE_IMAGE)
    if TF32:
        t = _rounded(t)
    _write(out, t, row, o0, place, inside, TILED)


@triton.jit
def convolution_back_kernel(
    x_desc,  # as of conv_kernel, as are all without a comment
    w_desc,
    height,
    output_tiles,
    outputs,
    other, plain, active, passed,  # maps by descriptors, [I * height * width / G, G * O]
    gates, gate_stride, site_start, per_mask,
    scaled, scaled_slope, scaled_offset, scaled_start, scaled_units,
    scale,
    result, result_slope, result_offset, result_start, result_units,
    moments_stride,
    ungated, flow, out,
    STEPS: tl.constexpr,
    START: tl.constexpr,
    POSITION: tl.constexpr,
    ROWS_K: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    COLUMNS: tl.constexpr,  # G
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TF32: tl.constexpr,
    ONE_MASK: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: a box of the gradient by an operation's input, and the epilogue before it."""
    BLOCK_M: tl.constexpr = IMAGES * ROWS * COLS
    o0 = tl.program_id(0) % output_tiles * BLOCK_O
    tile = tl.program_id(0) // output_tiles
    boxes = height // ROWS
    t = convolved(
        x_desc, w_desc, tile // boxes * IMAGES, tile % boxes * ROWS, o0, STEPS, START, POSITION,
        ROWS_K, 1, BLOCK_M, BLOCK_C, BLOCK_O, PRODUCTS, WIDEN,
    )  # fmt: skip
    image = tile // boxes * IMAGES
    if IMAGES > 1:
        image += tl.arange(0, BLOCK_M) // (ROWS * COLS)
    column = o0 + tl.arange(0, BLOCK_O)
    _taken_back(
        t, tile * BLOCK_M, o0, None, None, image, column % outputs, column < COLUMNS * outputs,
        other, plain, active, passed, gates, gate_stride, site_start, per_mask,
        scaled, scaled_slope, scaled_offset, scaled_start, scaled_units, scale,
        result, result_slope, result_offset, result_start, result_units, moments_stride,
        ungated, flow, out, FIRST, SECOND, TF32, ONE_MASK, IMAGES == 1, True,
    )  # fmt: skip


@triton.jit
def back_kernel(
    t,  # [rows, given]
    given,
    rows,
    channels,
    pixels,  # of an image
    other, plain, active, passed,
    gates, gate_stride, site_start, per_mask,
    scaled, scaled_slope, scaled_offset, scaled_start, scaled_units,
    scale,
    result, result_slope, result_offset, result_start, result_units,
    moments_stride,
    ungated, flow, out,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TF32: tl.constexpr,
    ONE_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R pixels, BLOCK_C channels."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    start = row.to(tl.int64)[:, None]
    image = tl.minimum(row, rows - 1) // pixels  # gates and moments are read for all rows
    pulled = tl.load(t + start * given + c[None, :], mask=inside & (c < given)[None, :], other=0.0)
    _taken_back(
        pulled.to(tl.float32), 0, 0, start * channels + c[None, :], inside, image,
        c, c < channels,
        other, plain, active, passed, gates, gate_stride, site_start, per_mask,
        scaled, scaled_slope, scaled_offset, scaled_start, scaled_units, scale,
        result, result_slope, result_offset, result_start, result_units, moments_stride,
        ungated, flow, out, FIRST, SECOND, TF32, ONE_MASK, False, False,
    )  # fmt: skip


@triton.jit
def gate_gradient_kernel(
    active,  # [I, P, C]
    ungated,
    out,  # [I, out_stride], from site_start on
    out_stride,
    site_start,
    pixels,  # P
    channels,
    sites,  # of the layer
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_C sites of an image, summed over its pixels."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for first in range(0, pixels, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        place = (image * pixels + p)[:, None] * channels + c[None, :]
        inside = (p < pixels)[:, None] & (c < sites)[None, :]
        values = tl.load(active + place, mask=inside, other=0.0)
        total += values * tl.load(ungated + place, mask=inside, other=0.0)
    summed = tl.sum(total, axis=0)
    tl.store(out + image * out_stride + site_start + c, summed, mask=c < sites)


def _arguments(reverse: Reverse, of_map: Callable[[Tensor | None], object]) -> tuple[object, ...]:
    """Of ``_taken_back``, from ``other`` to ``out``; ``of_map``: how a map is given."""

    def of(moments: Moments | None) -> tuple[object, ...]:
        if moments is None:
            return None, None, None, 0, 0
        start, units = moments.start, moments.units
        return of_map(moments.values), moments.slope, moments.offset, start, units

    gates = reverse.gates
    told = reverse.scaled or reverse.result
    return (
        of_map(reverse.other), of_map(reverse.plain),
        of_map(reverse.active if reverse.second else None),
        of_map(reverse.passed if reverse.first else None),
        gates, 0 if gates is None else gates.stride(0), reverse.site_start, reverse.per_mask,
        *of(reverse.scaled), reverse.scale, *of(reverse.result),
        0 if told is None else told.slope.stride(0),
        of_map(reverse.ungated), of_map(reverse.flow), of_map(reverse.out),
    )  # fmt: skip


def _constants(reverse: Reverse) -> dict[str, object]:
    gates = reverse.gates
    return {
        "FIRST": reverse.first, "SECOND": reverse.second, "TF32": reverse.tf32,
        "ONE_MASK": gates is not None and len(gates) == 1,
    }  # fmt: skip


def launch_convolution_back(x: Tensor, conv: Convolution, reverse: Reverse) -> None:
    """Convolve ``x [I, H, W, C]``, contiguous, the gradient by an operation's result, with its
    transposed kernel ``conv`` of stride 1, and take back the epilogue before it."""
    check_device(x)
    images, height, width, _ = x.shape
    columns, total = width // conv.columns, conv.columns * conv.outputs
    tile, box = conv.cut(images * height * columns)
    x_desc = TensorDescriptor.from_tensor(
        x.view(images, height, columns, conv.position), [*box, conv.block]
    )
    w_desc = TensorDescriptor.from_tensor(conv.weight, [tile.outputs, conv.block])

    def flat(values: Tensor | None) -> TensorDescriptor | None:
        if values is None:
            return None
        return TensorDescriptor.from_tensor(values.view(-1, total), [tile.pixels, tile.outputs])

    output_tiles = triton.cdiv(total, tile.outputs)
    tiles = images * height * columns // tile.pixels
    convolution_back_kernel[(tiles * output_tiles,)](
        x_desc, w_desc, height, output_tiles, conv.outputs, *_arguments(reverse, flat),
        STEPS=conv.steps, START=conv.start, POSITION=conv.position, ROWS_K=conv.kernel,
        IMAGES=box[0], ROWS=box[1], COLS=box[2], BLOCK_C=conv.block, BLOCK_O=tile.outputs,
        COLUMNS=conv.columns, **_constants(reverse), PRODUCTS="tf32x3" if conv.exact else "tf32",
        WIDEN=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_back(t: Tensor, reverse: Reverse) -> None:
    """Take back an epilogue from the gradient ``t [I, H, W, given]``, contiguous, by what it wrote;
    it is zero from ``given`` on."""
    check_device(t)
    channels, given = reverse.out.shape[3], t.shape[3]
    rows = reverse.out.numel() // channels
    block_c = min(128, triton.next_power_of_2(channels))
    block_r = EPILOGUE_BLOCK // block_c
    back_kernel[(triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))](
        t, given, rows, channels, t.shape[1] * t.shape[2], *_arguments(reverse, lambda one: one),
        **_constants(reverse), BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def launch_gate_gradient(
    active: Tensor, ungated: Tensor, out: Tensor, site_start: int, sites: int
) -> None:
    """Fill ``out [I, S]`` with a layer's gradients by its gates: the sums over pixels of ``active``
    times ``ungated [I, H, W, C]``, contiguous."""
    check_device(active)
    images, height, width, channels = active.shape
    gate_gradient_kernel[(images, triton.cdiv(sites, CHANNELS))](
        active, ungated, out, out.stride(0), site_start, height * width, channels, sites,
        BLOCK_P=PIXELS, BLOCK_C=CHANNELS, num_warps=4,
    )  # fmt: skip
