"""The GPU plan and its Triton kernels; on a machine without a GPU through the interpreter."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import NotBuiltError, ResourceError
from onp.ops import masked_forward_gpu, reference
from onp.ops import masked_forward_triton as kernels
from onp.ops._gpu_program import Precision
from onp.suspect.trace import Trace, trace
from tests.networks import network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 3e-2}
"""Relative to the largest value."""


def close(got: Tensor, want: Tensor, precision: str) -> None:
    assert got.shape == want.shape
    error = float((got.float().cpu() - want.float().cpu()).abs().max())
    assert error <= TOLERANCE[precision] * max(float(want.abs().max()), 1e-3)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def apply(t: Tensor, e: kernels.Epilogue, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The epilogue as written in ``_masked_forward_steps``: plain and final of t [I, H, W, C];
    rows [I]: each image's mask."""
    channels = t.shape[3]
    activation = {0: lambda x: x, 1: F.relu, 2: F.relu6}

    def own(values: Tensor | None, absent: float) -> Tensor:
        return torch.full((channels,), absent) if values is None else values[:channels].cpu()

    t = t + own(e.bias, 0)
    if e.residual is not None:
        t = t + e.residual.float().cpu()
    plain = activation[e.first](t)
    final = activation[e.second](plain * own(e.scale, 1) + own(e.shift, 0))
    if e.gates is not None:
        gates = e.gates.cpu()[rows, e.site_start : e.site_start + channels]
        final = final * gates[:, None, None]
    return plain, final


def epilogue_of(
    images: int, size: tuple[int, int], channels: int, dtype: torch.dtype, *, full: bool
) -> kernels.Epilogue:
    """An epilogue with everything in it, or with nothing but an output."""

    def new() -> Tensor:
        return torch.full((images, *size, channels), torch.nan, dtype=dtype, device=DEVICE)

    def values(shift: int) -> Tensor:
        return drawn(channels + shift)[:channels].to(DEVICE)

    if not full:
        nothing = (None, None, 2, None, None, None, 0, None, 0, images)
        return kernels.Epilogue(*nothing, new())
    residual = drawn(images, *size, channels).to(DEVICE, dtype)
    gates = F.pad((torch.rand(2, channels + 3) < 0.7).float(), (0, kernels.ALIGNMENT))
    return kernels.Epilogue(
        values(0), residual, 1, new(), values(1), values(2), 2, gates.to(DEVICE), 3,
        images // 2, new(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "stride", "channels", "outputs", "size", "columns"),
    [
        (3, 1, 64, 64, (4, 8), None),
        (3, 1, 64, 64, (8, 4), 1),
        (3, 1, 16, 16, (8, 16), None),
        (3, 1, 32, 32, (8, 8), None),
        (3, 1, 16, 64, (4, 8), None),
        (3, 1, 48, 48, (4, 4), None),
        (3, 1, 256, 128, (4, 4), None),
        (3, 2, 16, 144, (4, 4), None),
        (3, 2, 32, 64, (4, 8), None),
        (1, 2, 48, 16, (8, 4), None),
        (1, 1, 32, 80, (4, 4), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["tf32", "bf16"])
def test_convolution_with_its_epilogue(
    kernel: int, stride: int, channels: int, outputs: int, size: tuple[int, int],
    columns: int | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    images = 32
    x = drawn(images, size[0] * stride, size[1] * stride, channels).to(DEVICE, dtype)
    weight = (drawn(outputs, channels, kernel, kernel) / (channels * kernel**2) ** 0.5).to(dtype)
    prepared = kernels.prepare(weight.to(DEVICE), stride, *size, dtype, columns=columns)
    assert prepared is not None
    narrow = {16: 4, 32: 2, 64: 2} if kernel == 3 and stride == 1 else {}
    assert prepared.columns == (columns or narrow.get(outputs, 1))
    result = F.conv2d(
        x.cpu().double().permute(0, 3, 1, 2), weight.double(), None, stride, kernel // 2
    ).float()
    for full in (True, False):
        epilogue = epilogue_of(images, size, outputs, dtype, full=full)
        kernels.launch_conv(x, prepared, epilogue)
        rows = torch.arange(images) // (images // 2)
        plain, final = apply(result.permute(0, 2, 3, 1), epilogue, rows)
        precision = "tf32" if dtype == torch.float32 else "bf16"
        close(epilogue.final, final, precision)
        if epilogue.plain is not None:
            close(epilogue.plain, plain, precision)


@pytest.mark.parametrize("given", [16, 11, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("full", [True, False])
def test_epilogue_alone(given: int, dtype: torch.dtype, full: bool) -> None:
    x = drawn(6, 3, 5, given).to(DEVICE, dtype)
    epilogue = epilogue_of(6, (3, 5), 16, dtype, full=full)
    kernels.launch_epilogue(x, epilogue)
    whole = F.pad(x.float().cpu(), (0, 16 - given))
    plain, final = apply(whole, epilogue, torch.arange(6) // 3)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    close(epilogue.final, final, precision)
    if epilogue.plain is not None:
        close(epilogue.plain, plain, precision)


def test_outputs_are_rounded_to_tf32() -> None:
    """To the nearest: what is left over cancels out, where cutting would add up."""
    x, weight = drawn(16, 4, 4, 16).to(DEVICE), drawn(16, 16, 1, 1).to(DEVICE)
    exact = drawn(16, 4, 4, 16).to(DEVICE)
    finals = []
    for launch in ("conv", "epilogue"):
        wide, narrow = (
            replace(epilogue_of(16, (4, 4), 16, torch.float32, full=False), tf32=flag, first=0)
            for flag in (False, True)
        )
        for epilogue in (wide, narrow):
            if launch == "conv":
                prepared = kernels.prepare(weight, 1, 4, 4, torch.float32)
                assert prepared is not None
                kernels.launch_conv(x, prepared, epilogue)
            else:
                kernels.launch_epilogue(exact, epilogue)
        finals.append((wide.final, narrow.final))
    finals.append((exact, kernels.rounded_to_tf32(exact)))
    for before, after in finals:
        assert not bool((after.view(torch.int32) & 0x1FFF).any())
        off = (after - before).double() / before.double()
        assert 2**-13 < float(off.abs().max()) <= 2**-11
        assert abs(float(off.mean())) < 2**-15


def test_nan_stays_nan_in_tf32() -> None:
    """All of a NaN's bits can be set, as they are in those that a GPU makes."""
    broken = torch.tensor([0x7FFFFFFF, -1, 0x7F800000, -0x800000] * 4, dtype=torch.int32)
    x = broken.view(torch.float32).view(1, 1, 1, 16).to(DEVICE)
    epilogue = replace(
        epilogue_of(1, (1, 1), 16, torch.float32, full=False), first=0, tf32=True, plain_tf32=True,
        plain=torch.zeros_like(x),
    )  # fmt: skip
    kernels.launch_epilogue(x, epilogue)
    assert epilogue.plain is not None
    for got in (epilogue.final, epilogue.plain, kernels.rounded_to_tf32(x)):
        assert got.flatten().isnan().tolist() == [True, True, False, False] * 4
        assert got.flatten()[2:4].tolist() == [torch.inf, -torch.inf]


def test_tiles_fit_a_smaller_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory of an A100, of a consumer's card, of a T4, and of less than any tile needs."""
    weight = torch.zeros(256, 256, 3, 3)
    found = []
    for kilobytes in (227, 163, 99, 64):
        monkeypatch.setattr(kernels, "shared_memory", lambda _, room=kilobytes << 10: room - 1024)
        conv = kernels.prepare(weight, 1, 8, 8, torch.bfloat16)
        found.append(None if conv is None else kernels.TILES.index(conv.tile))
    assert found == [2, 1, 1, None]


@pytest.mark.parametrize(
    ("pixels", "height", "width", "box"),
    [
        (128, 32, 32, (1, 4, 32)), (128, 8, 8, (2, 8, 8)), (256, 4, 4, (16, 4, 4)),
        (128, 2, 2, None), (128, 7, 7, None), (128, 12, 16, None), (128, 256, 256, None),
    ],
)  # fmt: skip
def test_boxes_tile_whole_maps(
    pixels: int, height: int, width: int, box: tuple[int, int, int] | None
) -> None:
    assert kernels.box_of(pixels, height, width) == box


def settled(name: str, size: int) -> tuple[nn.Module, Trace]:
    model = network(name, size=(size, size))
    return model, trace(model, (3, size, size))


def expected(model: nn.Module, traced: Trace, pruned: Tensor, images: Tensor) -> Tensor:
    names = [[str(traced.ops[c].module) for c in layer.consumers] for layer in traced.layers]
    layers = [(layer.sites, own) for layer, own in zip(traced.layers, names, strict=True)]
    return reference.masked_forward(model, layers, pruned, images)


@pytest.mark.parametrize(
    ("name", "size", "precision"),
    [
        ("preactresnet18", 16, "bf16"),
        ("preactresnet18", 16, "fp32"),
        ("resnet20", 16, "tf32"),
        ("resnet20-option-a", 12, "tf32"),
        ("vgg16_bn", 32, "tf32"),
        ("mobilenetv2", 8, "fp32"),
        ("densenet", 8, "tf32"),
    ],
)
def test_networks(name: str, size: int, precision: Precision) -> None:
    model, traced = settled(name, size)
    pruned = torch.rand(2, traced.sites) < 0.1
    images = torch.rand(3, 3, size, size)
    want = expected(model, traced, pruned, images)
    plan = masked_forward_gpu.lower(traced, model, DEVICE, precision)
    got = plan.run(pruned, images)
    assert got.dtype == torch.float32
    assert got.device.type == DEVICE
    close(got, want, precision)


@pytest.mark.gpu
def test_calls_that_repeat_are_replayed() -> None:
    model, traced = settled("preactresnet18", 16)
    plan = masked_forward_gpu.lower(traced, model, DEVICE, "tf32")
    other = masked_forward_gpu.lower(traced, model, DEVICE, "tf32")
    for call in range(masked_forward_gpu.REPLAYED_FROM + 3):
        pruned = torch.rand(2, traced.sites) < 0.1 * (call + 1) / 4
        images = torch.rand(16, 3, 16, 16)
        got = plan.run(pruned, images)
        assert torch.equal(got, other.run(pruned, images))
        other._graphs.clear()  # which so never captures
    graph = plan._graphs[2, 16]
    assert isinstance(graph, masked_forward_gpu._Graph)
    assert not torch.equal(got, plan.run(~pruned, images))


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Trace]:
    return settled("resnet20", 8)


def test_a_bound_on_memory_changes_nothing(small: tuple[nn.Module, Trace]) -> None:
    model, traced = small
    pruned, images = torch.rand(5, traced.sites) < 0.2, torch.rand(37, 3, 8, 8)
    plan = masked_forward_gpu.lower(traced, model, DEVICE, "fp32")
    whole = plan.run(pruned, images)
    close(whole, expected(model, traced, pruned, images), "fp32")
    for calls in (1, 3, 6):  # of 16, 48 and 96 images: parts of a mask, masks one by one, by twos
        plan.max_bytes = calls * 16 * plan.bytes_per_image
        close(plan.run(pruned, images), whole, "fp32")


@pytest.mark.parametrize(("masks", "images"), [(0, 4), (2, 0)])
def test_nothing_asked(small: tuple[nn.Module, Trace], masks: int, images: int) -> None:
    model, traced = small
    plan = masked_forward_gpu.lower(traced, model, DEVICE, "fp32")
    pruned = torch.zeros(masks, traced.sites, dtype=torch.bool)
    assert plan.run(pruned, torch.rand(images, 3, 8, 8)).shape == (masks, images, 7)


def test_out_of_memory_halves_the_bound_and_says_so(
    small: tuple[nn.Module, Trace],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, traced = small
    plan = masked_forward_gpu.lower(traced, model, DEVICE, "fp32")
    pruned, images = torch.rand(3, traced.sites) < 0.2, torch.rand(20, 3, 8, 8)
    want, room = plan.run(pruned, images), plan.max_bytes // 3
    forward = plan._forward

    def tight(gates: Tensor, images: Tensor) -> Tensor:
        if plan.max_bytes > room:
            raise torch.OutOfMemoryError("no room")
        return forward(gates, images)

    monkeypatch.setattr(plan, "_forward", tight)
    with caplog.at_level(logging.WARNING, "onp"):
        close(plan.run(pruned, images), want, "fp32")
    assert caplog.text.count("out of memory") == 2
    room = 0
    with pytest.raises(ResourceError, match="no room for 16 images"):
        plan.run(pruned, images)


def test_wrong_arguments_are_named(small: tuple[nn.Module, Trace]) -> None:
    model, traced = small
    plan = masked_forward_gpu.lower(traced, model, DEVICE, "fp32")
    pruned, images = torch.zeros(1, traced.sites, dtype=torch.bool), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="masks must be bool"):
        plan.run(pruned.float(), images)
    with pytest.raises(ValueError, match=r"masks must be bool \[B"):
        plan.run(pruned[:, 1:], images)
    with pytest.raises(ValueError, match="images must be float32"):
        plan.run(pruned, images.double())


def test_missing_triton_is_named(
    small: tuple[nn.Module, Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("onp.ops.masked_forward_triton")
    monkeypatch.delitem(sys.modules, "onp.ops.masked_forward_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NotBuiltError, match="Triton is not installed"):
        masked_forward_gpu.lower(small[1], small[0], DEVICE, "fp32")


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="need CUDA tensors"):
        kernels.launch_epilogue(
            torch.zeros(1, 1, 1, 16), epilogue_of(1, (1, 1), 16, torch.float32, full=False)
        )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_convolutions_compile_for_hopper(dtype: str, tmp_path: Path) -> None:
    """Each tile, with everything in its epilogue; both operands from shared memory."""
    program = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onp.ops import masked_forward_triton as kernels

kernel, dtype = kernels.conv_kernel, sys.argv[1]
for tile, stride in [(tile, stride) for tile in kernels.TILES for stride in (1, 2)]:
    box = kernels.box_of(tile.pixels, 16, 16)
    block = [*box, 32] if stride == 1 else [box[0], box[1], 1, box[2], 32]
    constants = dict(
        STEPS=6, START=-64, POSITION=64 * stride, ROWS_K=3, STRIDE=stride, IMAGES=box[0],
        ROWS=box[1], COLS=box[2], BLOCK_C=32, BLOCK_O=tile.outputs, FIRST=0, SECOND=1,
        TF32=dtype == "fp32", PLAIN_TF32=False, PER_IMAGE=False, PRODUCTS="tf32", WIDEN=False,
    )
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"x_desc": f"tensordesc<{dtype}{block}>"}
    types |= {"w_desc": f"tensordesc<{dtype}[{tile.outputs}, 32]>"}
    outputs = [name for name in kernel.arg_names if name.endswith("_desc")][2:]
    types |= dict.fromkeys(outputs, f"tensordesc<{dtype}[{tile.pixels}, {tile.outputs}]>")
    types |= dict.fromkeys(("bias", "scale", "shift", "gates"), "*fp32")
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel, types, {(kernel.arg_names.index(name),): v for name, v in constants.items()}
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    product = [line for line in made.asm["ttgir"].splitlines() if "warp_group_dot " in line]
    assert product and all("dot_op" not in line for line in product)
"""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", program, dtype], check=True, env=environment)
