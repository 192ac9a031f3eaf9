"""Triton kernels of the masked forward on a GPU: convolution by tensor cores with everything behind
it in the epilogue, and that epilogue alone behind what cuDNN computes.

Maps are ``[I, H, W, C]``, channels a multiple of 16 (further ones are zero); sums are fp32. A
convolution is an implicit GEMM whose tiles are loaded by the tensor memory accelerator: a tile of
pixels is a box of the map, moved by the tap, and what lies outside of the map reads as zero. At
stride 2 rows are split by parity and two columns are one position of the box. In narrow layers,
too, some columns are one position, of as many times the channels: the matrix units want no fewer
than 64 outputs, and the loads lines of 128 bytes. Their weights are zero where a column is no
neighbour. The product is computed transposed, weights times pixels: of the operands of Hopper's
matrix instruction the second alone may be a reshaped box in shared memory.

Imported when a call needs it. Under ``TRITON_INTERPRET=1``, set before this module is imported, the
kernels run on CPU tensors without a driver.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALIGNMENT = 16
"""Channels of a map, and images of a mask in one call, are multiples of this; gates are read this
far beyond their end."""


@dataclass(frozen=True)
class Tile:
    """How a convolution is cut: output pixels and channels of one program, warps, stages."""

    pixels: int
    outputs: int
    warps: int
    stages: int

    def shared(self, line: int) -> int:
        """Bytes of shared memory, of lines of that many bytes, barriers left out."""
        return self.stages * (self.pixels + self.outputs) * line


TILES = (Tile(128, 64, 4, 3), Tile(128, 128, 4, 3), Tile(256, 128, 8, 4))
"""Below 128 outputs; above; and above with sums of at least DEEP products."""
NARROW = Tile(128, 64, 4, 4)
"""For calls of few images."""
EXACT_TILES = TILES[:1]
LEAN_TILES = (Tile(128, 128, 8, 3), NARROW)
"""With three products for one, and with a long epilogue: larger ones spill registers. The first
is for maps that fill a tile alone."""
FEWEST = 100
"""Programs of a launch: with fewer, a smaller tile is taken; Hopper has 132 multiprocessors."""
DEEP = 2304
HOPPER = 226 << 10
"""Bytes of shared memory of a program on an H100 or H200, some left for barriers."""
EPILOGUE_BLOCK = 2048
"""Values of one program of an epilogue alone; twice as many spill registers."""
COLUMNS = {16: 4, 32: 2, 64: 2}
"""Columns that are one position where a 3x3 convolution has so few outputs. Below 64 this needs no
more products than idle outputs would; at 64 a third more in faster tiles, which pays without a
residual to read (measured on an H100)."""


@dataclass(frozen=True)
class Epilogue:
    """What becomes of an operation's result t, per channel: see ``_masked_forward_steps``."""

    bias: Tensor | None
    """float32 [C], as are scale and shift."""
    residual: Tensor | None
    """[I, H, W, C]"""
    first: int
    """Activation: 0 none, 1 ReLU, 2 ReLU6."""
    plain: Tensor | None
    """Where t is written, [I, H, W, C];"""
    scale: Tensor | None
    shift: Tensor | None
    second: int
    gates: Tensor | None
    """float32 [B, S + ALIGNMENT]: factors on the sites, a row a mask."""
    site_start: int
    per_mask: int
    """Images of a mask."""
    final: Tensor
    """and where the gated value is written, [I, H, W, C],"""
    tf32: bool = False
    """rounded to TF32, which the matrix units would else cut it to;"""
    plain_tf32: bool = False
    """and whether ``plain`` is."""
    result: Tensor | None = None
    """Where a backward pass wants to see t + bias, before the residual,"""
    scaled: Tensor | None = None
    """t * scale + shift,"""
    active: Tensor | None = None
    """and what is gated; float32 all, as they are."""


@triton.jit
def _activated(t, KIND: tl.constexpr):
    if KIND >= 1:
        t = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == 2:
        t = tl.minimum(t, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return t


@triton.jit
def _rounded(t):
    """fp32 to the nearest TF32, ties away from zero."""
    bits = t.to(tl.int32, bitcast=True)
    return tl.where(t == t, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), t)  # NaN


@triton.jit
def convolved(
    x_desc,
    w_desc,
    image,
    top,
    o0,
    STEPS: tl.constexpr,  # as of conv_kernel
    START: tl.constexpr,
    POSITION: tl.constexpr,
    ROWS_K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The sums of a box, float32 [BLOCK_M, BLOCK_O], with nothing behind them."""
    acc = tl.zeros([BLOCK_O, BLOCK_M], dtype=tl.float32)
    for k in tl.range(0, ROWS_K * STEPS):
        dy = k // STEPS - ROWS_K // 2
        channel = k % STEPS * BLOCK_C + (START + POSITION)  # not negative
        left = channel // POSITION - 1
        if STRIDE == 1:
            box = x_desc.load([image, top + dy, left, channel % POSITION])
        else:
            box = x_desc.load([image, top + (dy >> 1), dy & 1, left, channel % POSITION])
        pixels = box.reshape([BLOCK_M, BLOCK_C])
        weights = w_desc.load([o0, k * BLOCK_C])
        if WIDEN:
            pixels = pixels.to(tl.float32)
            weights = weights.to(tl.float32)
        acc = tl.dot(weights, pixels.T, acc, input_precision=PRODUCTS)
    return acc.T


@triton.jit
def conv_kernel(
    x_desc,  # stride 1: [I, H, W / G, G * C]; stride 2: [I, H / 2, 2, W / 2, 2 * C]
    w_desc,  # [G * O, ROWS_K * STEPS * BLOCK_C]
    residual_desc,  # [I * height * width, G * O], as those written
    plain_desc,
    final_desc,
    result_desc,
    scaled_desc,
    active_desc,
    bias,  # [O] fp32
    scale,
    shift,
    gates,  # [B, gate_stride] fp32
    gate_stride,
    site_start,
    per_mask,
    height,  # of the output
    output_tiles,
    outputs,  # O
    STEPS: tl.constexpr,  # blocks of channels that a row of the kernel reads,
    START: tl.constexpr,  # from this channel on, seen from the output's position
    POSITION: tl.constexpr,  # channels of a position of x
    ROWS_K: tl.constexpr,  # of the kernel
    STRIDE: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TF32: tl.constexpr,
    PLAIN_TF32: tl.constexpr,
    PER_IMAGE: tl.constexpr,  # images of a box are of several masks
    PRODUCTS: tl.constexpr,  # of fp32: "tf32", or "tf32x3", which are exact
    WIDEN: tl.constexpr,  # the interpreter multiplies fp32 alone
):
    """One program: a box of IMAGES x ROWS x COLS positions of the output, BLOCK_O of their
    channels; G columns are one position."""
    BLOCK_M: tl.constexpr = IMAGES * ROWS * COLS
    o0 = tl.program_id(0) % output_tiles * BLOCK_O
    tile = tl.program_id(0) // output_tiles
    boxes = height // ROWS
    image = tile // boxes * IMAGES
    top = tile % boxes * ROWS
    t = convolved(
        x_desc, w_desc, image, top, o0, STEPS, START, POSITION, ROWS_K, STRIDE, BLOCK_M, BLOCK_C,
        BLOCK_O, PRODUCTS, WIDEN,
    )  # fmt: skip
    row = tile * BLOCK_M
    o = (o0 + tl.arange(0, BLOCK_O)) % outputs
    if bias is not None:
        t += tl.load(bias + o)[None, :]
    if result_desc is not None:
        result_desc.store([row, o0], t)
    if residual_desc is not None:
        t += residual_desc.load([row, o0]).to(tl.float32)
    t = _activated(t, FIRST)
    if plain_desc is not None:
        plain = _rounded(t) if PLAIN_TF32 else t
        plain_desc.store([row, o0], plain.to(plain_desc.dtype))
    if scale is not None:
        t = t * tl.load(scale + o)[None, :] + tl.load(shift + o)[None, :]
    if scaled_desc is not None:
        scaled_desc.store([row, o0], t)
    t = _activated(t, SECOND)
    if active_desc is not None:
        active_desc.store([row, o0], t)
    if PER_IMAGE:
        own = (image + tl.arange(0, BLOCK_M) // (ROWS * COLS)) // per_mask * gate_stride
        t *= tl.load(gates + own[:, None] + (site_start + o)[None, :])
    elif gates is not None:
        mask = (image // per_mask).to(tl.int64)
        t *= tl.load(gates + mask * gate_stride + site_start + o)[None, :]
    if TF32:
        t = _rounded(t)
    final_desc.store([row, o0], t.to(final_desc.dtype))


@triton.jit
def epilogue_kernel(
    x,  # [rows, given]
    residual,  # [rows, channels], as those written
    plain,
    final,
    result,
    scaled,
    active,
    bias,
    scale,
    shift,
    gates,
    gate_stride,
    site_start,
    images_pixels,  # pixels of all images of a mask
    rows,
    given,
    channels,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    TF32: tl.constexpr,
    PLAIN_TF32: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_R pixels, BLOCK_C channels."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    in_given = (row < rows)[:, None] & (c < given)[None, :]
    t = tl.load(x + row[:, None] * given + c[None, :], mask=in_given, other=0.0).to(tl.float32)
    place = row[:, None] * channels + c[None, :]
    in_channels = c < channels
    if bias is not None:
        t += tl.load(bias + c, mask=in_channels, other=0.0)[None, :]
    if result is not None:
        tl.store(result + place, t, mask=inside)
    if residual is not None:
        t += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    t = _activated(t, FIRST)
    if plain is not None:
        written = _rounded(t) if PLAIN_TF32 else t
        tl.store(plain + place, written.to(plain.dtype.element_ty), mask=inside)
    if scale is not None:
        factor = tl.load(scale + c, mask=in_channels, other=0.0)
        t = t * factor[None, :] + tl.load(shift + c, mask=in_channels, other=0.0)[None, :]
    if scaled is not None:
        tl.store(scaled + place, t, mask=inside)
    t = _activated(t, SECOND)
    if active is not None:
        tl.store(active + place, t, mask=inside)
    if gates is not None:
        own = row // images_pixels * gate_stride + site_start
        t *= tl.load(gates + own[:, None] + c[None, :], mask=inside, other=0.0)
    if TF32:
        t = _rounded(t)
    tl.store(final + place, t.to(final.dtype.element_ty), mask=inside)


def box_of(pixels: int, height: int, width: int) -> tuple[int, int, int] | None:
    """Images, rows and columns of a box of ``pixels`` that tiles maps of height x width; None if
    there is none: maps whose sides are no powers of 2, or too small."""
    sides_fit = height & (height - 1) == 0 and width & (width - 1) == 0
    if not sides_fit or width > pixels or height * width < pixels // ALIGNMENT:
        return None
    rows = min(height, pixels // width)
    return pixels // (rows * width), rows, width


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have, some left for barriers: of the GPU; off one Hopper's."""
    if device.type != "cuda":
        return HOPPER
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"]) - 1024


@dataclass(frozen=True)
class Convolution:
    """A convolution prepared for ``launch_conv``."""

    weight: Tensor
    """[G * O, kernel rows * steps * block]"""
    outputs: int
    """O"""
    columns: int
    """G: columns of the output that are one position of its box."""
    stride: int
    kernel: int
    start: int
    position: int
    """Channels of a position of the input."""
    block: int
    """Channels that are loaded at a time."""
    box: tuple[int, int, int]
    tile: Tile
    exact: bool
    """Whether float32 is multiplied as it is, by three TF32 products, and not rounded."""
    smaller: tuple[tuple[Tile, tuple[int, int, int]], ...]
    """Tiles and boxes for calls of few images, which would leave processors idle."""

    def cut(self, positions: int, *, lean: bool = False) -> tuple[Tile, tuple[int, int, int]]:
        """The tile and box for so many positions of the output; the smallest if ``lean``: gates of
        each image by itself need room that large tiles do not leave."""
        total = self.columns * self.outputs
        ways = ((self.tile, self.box), *self.smaller)
        if lean:
            return ways[-1]
        for tile, box in ways:
            if positions // tile.pixels * triton.cdiv(total, tile.outputs) >= FEWEST:
                return tile, box
        return ways[-1]

    @property
    def steps(self) -> int:
        """Blocks of channels that a row of the kernel reads."""
        return self.weight.shape[1] // (self.kernel * self.block)


def prepare(
    weight: Tensor,
    stride: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    columns: int | None = None,
    exact: bool = False,
    lean: bool = False,
) -> Convolution | None:
    """A convolution with ``weight [O, C, k, k]`` (O and C multiples of ALIGNMENT, k 1 or 3, padded
    by k // 2) at stride 1 or 2 to maps of height x width; None where there is no tile for these.
    float32 is rounded to TF32, unless ``exact``. ``residual``: whether the epilogue reads one.
    ``columns``: of a position, at stride 1; default: what is fastest. ``lean``: for an epilogue
    that needs many registers."""
    outputs, channels, kernel, _ = weight.shape
    if columns is None:
        narrow = stride == 1 and kernel == 3 and not (residual and outputs == 64)
        columns = COLUMNS.get(outputs, 1) if narrow else 1
        columns = columns if width % columns == 0 else 1
    position = channels * max(columns, stride)
    line = 64 if dtype.itemsize == 2 else 32  # of shared memory: 128 bytes
    block = next(size for size in (64, 32, 16) if size <= line and position % size == 0)
    pad = kernel // 2
    start = -channels * pad // block * block  # rounded down
    length = -(-((columns + pad) * channels - start) // block) * block  # rounded up
    spread = weight.new_zeros(columns, outputs, kernel, length)
    for column in range(columns):
        for dx in range(kernel):
            first = (column + dx - pad) * channels - start
            taps = weight[:, :, :, dx].transpose(1, 2)  # [O, k, C]
            spread[column, :, :, first : first + channels] = taps
    rounds = dtype == torch.float32 and not exact
    spread = rounded_to_tf32(spread) if rounds else spread.to(dtype)
    total = columns * outputs
    room = shared_memory(weight.device)
    wide = total >= 128
    most = 0 if not wide else 2 if kernel * length >= DEEP else 1
    candidates: tuple[Tile, ...] = (*TILES[most:0:-1], NARROW) if wide else TILES[:1]
    if exact:
        candidates = EXACT_TILES
    elif lean:
        alone = wide and height * width // columns >= LEAN_TILES[0].pixels
        candidates = LEAN_TILES if alone else LEAN_TILES[1:]
    tiles = [
        (tile, box)
        for tile in candidates
        if tile.shared(block * dtype.itemsize) <= room
        and (box := box_of(tile.pixels, height, width // columns)) is not None
    ]
    if not tiles:
        return None
    (tile, box), *smaller = tiles
    return Convolution(
        spread.reshape(total, kernel * length), outputs, columns, stride, kernel, start,
        position, block, box, tile, exact, tuple(smaller),
    )  # fmt: skip


def rounded_to_tf32(values: Tensor) -> Tensor:
    """float32 to the nearest TF32: errors half as large as by cutting the lower 13 bits, which the
    matrix units do not read, and in both directions, so that layers do not add them up."""
    rounded = ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)


def launch_conv(x: Tensor, conv: Convolution, epilogue: Epilogue) -> None:
    """Convolve ``x [I, H, W, C]``, contiguous; I * height * width of the output a multiple of the
    tile's pixels times columns."""
    check_device(x)
    images, rows_in, columns_in, _ = x.shape
    final, block = epilogue.final, conv.block
    height, width = final.shape[1], final.shape[2]
    gates, per_mask = epilogue.gates, epilogue.per_mask
    places = images * height * (width // conv.columns)
    tile, box = conv.cut(places, lean=gates is not None and per_mask % ALIGNMENT != 0)
    if conv.stride == 1:
        positions = x.view(images, rows_in, columns_in // conv.columns, conv.position)
        x_desc = TensorDescriptor.from_tensor(positions, [*box, block])
    else:
        split = x.view(images, rows_in // 2, 2, columns_in // 2, conv.position)
        x_desc = TensorDescriptor.from_tensor(split, [box[0], box[1], 1, box[2], block])
    total = conv.columns * conv.outputs

    def flat(values: Tensor | None) -> TensorDescriptor | None:
        if values is None:
            return None
        return TensorDescriptor.from_tensor(values.view(-1, total), [tile.pixels, tile.outputs])

    output_tiles = triton.cdiv(total, tile.outputs)
    tiles = images * height * (width // conv.columns) // tile.pixels
    conv_kernel[(tiles * output_tiles,)](
        x_desc, TensorDescriptor.from_tensor(conv.weight, [tile.outputs, block]),
        flat(epilogue.residual), flat(epilogue.plain), flat(final), flat(epilogue.result),
        flat(epilogue.scaled), flat(epilogue.active),
        epilogue.bias, epilogue.scale, epilogue.shift,
        gates, 0 if gates is None else gates.stride(0), epilogue.site_start, per_mask,
        height, output_tiles, conv.outputs,
        STEPS=conv.steps, START=conv.start, POSITION=conv.position, ROWS_K=conv.kernel,
        STRIDE=conv.stride, IMAGES=box[0], ROWS=box[1], COLS=box[2], BLOCK_C=block,
        BLOCK_O=tile.outputs, FIRST=epilogue.first, SECOND=epilogue.second, TF32=epilogue.tf32,
        PLAIN_TF32=epilogue.plain_tf32,
        PER_IMAGE=gates is not None and per_mask % box[0] != 0,
        PRODUCTS="tf32x3" if conv.exact else "tf32", WIDEN=INTERPRETED, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def launch_epilogue(x: Tensor, epilogue: Epilogue) -> None:
    """Behind an operation's result ``x [I, H, W, given]``, contiguous; channels from ``given`` on
    are zero."""
    check_device(x)
    final, gates = epilogue.final, epilogue.gates
    channels = final.shape[3]
    rows = x.numel() // x.shape[3]
    block_c = min(128, triton.next_power_of_2(channels))
    block_r = EPILOGUE_BLOCK // block_c
    epilogue_kernel[(triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))](
        x, epilogue.residual, epilogue.plain, final, epilogue.result, epilogue.scaled,
        epilogue.active, epilogue.bias, epilogue.scale, epilogue.shift,
        gates, 0 if gates is None else gates.stride(0), epilogue.site_start,
        epilogue.per_mask * x.shape[1] * x.shape[2], rows, x.shape[3], channels,
        FIRST=epilogue.first, SECOND=epilogue.second, TF32=epilogue.tf32,
        PLAIN_TF32=epilogue.plain_tf32, BLOCK_R=block_r,
        BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def check_device(x: Tensor) -> None:
    """Raise ValueError for a tensor that the kernels cannot run on."""
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(
            "masked_forward: Triton kernels need CUDA tensors "
            f"(or TRITON_INTERPRET=1 before the first call), got {x.device}"
        )
