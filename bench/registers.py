"""``python -m bench.registers``: what our GPU kernels take of a Hopper multiprocessor.

Compiles every Triton kernel in the forms that PreActResNet-18 of width 64 and a graph of 64
features need, and the CUDA sources where nvcc is installed; no GPU is needed. Registers and spilled
bytes are what the assembler says, resident programs follow from registers and shared memory. Exit
code 1 if anything is spilled.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels.convolution_gpu import SHAPES
from onp.files import write_json
from onp.ops import masked_forward_triton, masked_gradient_triton, message_passing_triton

_BENCH = Path(__file__).parent
_CUDA = _BENCH.parent / "csrc"
TARGET = GPUTarget("cuda", 90, 32)
REGISTERS, SHARED = 65536, 227 << 10
"""Of a multiprocessor."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYERS = SHAPES | {"16 to 64, 32x32 (images)": (16, 64, 32, 1, 3)}


@dataclass(frozen=True)
class Usage:
    kernel: str
    form: str
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread."""
    shared: int
    """Bytes of a program."""
    warps: int
    resident: int
    """Programs on a multiprocessor at once, by registers and shared memory."""


def usage(kernel: str, form: str, made: Any, warps: int) -> Usage:
    """Of a compiled Triton kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", str(cubin)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", told)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    shared = made.metadata.shared
    resident = min(REGISTERS // (registers * 32 * warps), SHARED // max(shared, 1), 64 // warps)
    return Usage(kernel, form, registers, stack + local, shared, warps, resident)


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """A kernel for the target; types of arguments, constants by name."""
    types = types | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, places, aligned)
    return triton.compile(source, target=TARGET, options=options)


def convolutions() -> Iterator[Usage]:
    """Each layer with nothing but bias, activation and gates, and with all that an epilogue has."""
    kernel = masked_forward_triton.conv_kernel
    for layer, (channels, outputs, side, stride, size) in LAYERS.items():
        for dtype, torch_dtype in DTYPES.items():
            for full in (False, True):
                weight = torch.zeros(outputs, channels, size, size)
                conv = masked_forward_triton.prepare(
                    weight, stride, side, side, torch_dtype, residual=full
                )
                assert conv is not None
                tile, (images, rows, columns), block = conv.tile, conv.box, conv.block
                box = [images, rows, columns] if stride == 1 else [images, rows, 1, columns]
                types = dict.fromkeys(kernel.arg_names, "i32")
                types |= {"x_desc": f"tensordesc<{dtype}{[*box, block]}>"}
                types |= {"w_desc": f"tensordesc<{dtype}[{tile.outputs}, {block}]>"}
                written = f"tensordesc<{dtype}[{tile.pixels}, {tile.outputs}]>"
                maps = [name for name in kernel.arg_names if name.endswith("_desc")][2:]
                types |= dict.fromkeys(maps, written)
                types |= dict.fromkeys(("bias", "scale", "shift", "gates"), "*fp32")
                constants = {
                    "STEPS": conv.steps, "START": conv.start, "POSITION": conv.position,
                    "ROWS_K": size, "STRIDE": stride, "IMAGES": images, "ROWS": rows,
                    "COLS": columns, "BLOCK_C": block, "BLOCK_O": tile.outputs, "FIRST": 0,
                    "SECOND": 1, "TF32": dtype == "fp32", "PLAIN_TF32": False, "WIDEN": False,
                    "PER_IMAGE": False, "PRODUCTS": "tf32",
                }  # fmt: skip
                constants |= dict.fromkeys(("result_desc", "scaled_desc", "active_desc"))
                if not full:
                    absent = ("residual_desc", "plain_desc", "scale", "shift")
                    constants |= dict.fromkeys(absent)
                made = compiled(
                    kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages
                )
                form = f"{layer}, {dtype}, {'full' if full else 'light'} epilogue"
                yield usage("conv_kernel", form, made, tile.warps)


BACK = {
    "gates": ("active", "gates", "ungated", "out"),
    "gates, scaled and plain": ("active", "plain", "gates", "scale", "ungated", "out"),
    "moments": ("passed", "result", "result_slope", "result_offset", "out"),
    "moments, scaled and plain": (
        "active", "plain", "scaled", "scaled_slope", "scaled_offset", "scale", "out",
    ),
}  # fmt: skip
"""What the epilogues that are taken back in PreActResNet-18 read and write."""


def convolutions_back() -> Iterator[Usage]:
    """Gradients by the inputs of the layers of stride 1."""
    kernel = masked_gradient_triton.convolution_back_kernel
    maps = ["other", "plain", "active", "passed", "scaled", "result", "ungated", "flow", "out"]
    rows = ["gates", "scale", "scaled_slope", "scaled_offset", "result_slope", "result_offset"]
    for layer, (channels, outputs, side, stride, size) in LAYERS.items():
        if stride != 1:
            continue
        conv = masked_forward_triton.prepare(
            torch.zeros(channels, outputs, size, size), 1, side, side, torch.float32,
            residual=True, lean=True,
        )  # fmt: skip
        assert conv is not None
        tile, (images, high, wide), block = conv.tile, conv.box, conv.block
        for form, present in BACK.items():
            types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(rows, "*fp32")
            types |= dict.fromkeys(maps, f"tensordesc<fp32[{tile.pixels}, {tile.outputs}]>")
            types |= {"x_desc": f"tensordesc<fp32{[images, high, wide, block]}>"}
            types |= {"w_desc": f"tensordesc<fp32[{tile.outputs}, {block}]>"}
            constants = {
                "STEPS": conv.steps, "START": conv.start, "POSITION": conv.position,
                "ROWS_K": size, "IMAGES": images, "ROWS": high, "COLS": wide, "BLOCK_C": block,
                "BLOCK_O": tile.outputs, "COLUMNS": conv.columns, "FIRST": int("passed" in present),
                "SECOND": int("active" in present), "TF32": True, "ONE_MASK": True,
                "PRODUCTS": "tf32", "WIDEN": False,
            } | dict.fromkeys(name for name in (*maps, *rows) if name not in present)  # fmt: skip
            made = compiled(kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)
            yield usage("convolution_back_kernel", f"{layer}, {form}", made, tile.warps)


def epilogues() -> Iterator[Usage]:
    kernel = masked_forward_triton.epilogue_kernel
    block = masked_forward_triton.EPILOGUE_BLOCK // 64
    for dtype in DTYPES:
        types = dict.fromkeys(kernel.arg_names, "i32")
        types |= dict.fromkeys(("x", "residual", "plain", "final"), f"*{dtype}")
        types |= dict.fromkeys(("result", "scaled", "active"), "*fp32")
        types |= dict.fromkeys(("bias", "scale", "shift", "gates"), "*fp32")
        constants = {
            "FIRST": 0,
            "SECOND": 1,
            "TF32": dtype == "fp32",
            "BLOCK_R": block,
            "BLOCK_C": 64,
        }
        made = compiled(kernel, types, constants, num_warps=4)
        yield usage("epilogue_kernel", f"64 channels, {dtype}", made, 4)


def messages() -> Iterator[Usage]:
    """Every configuration that is tried."""
    kernels = message_passing_triton
    for name, tuned, configs in (
        ("sum_kernel", kernels.sum_kernel, kernels.SUM_CONFIGS),
        ("weight_grad_kernel", kernels.weight_grad_kernel, kernels.CONFIGS),
    ):
        for dtype in DTYPES:
            for config in configs:
                constants = {"FEATURES": kernels.MOST_FEATURES} | config.kwargs
                types = dict.fromkeys(tuned.fn.arg_names, f"*{dtype}")
                types |= dict.fromkeys(("indptr", "indices"), "*i64")
                sizes = ("batch", "batch_stride", "nodes", "features")
                types |= {size: "i32" for size in sizes if size in tuned.fn.arg_names}
                made = compiled(tuned.fn, types, constants, num_warps=config.num_warps)
                form = ", ".join(f"{key.lower()} {value}" for key, value in config.kwargs.items())
                form = f"64 features, {dtype}, {form}, warps {config.num_warps}"
                yield usage(name, form, made, config.num_warps)


def cuda_sources() -> Iterator[Usage]:
    """What nvcc says of csrc/cuda; nothing without it."""
    nvcc = shutil.which("nvcc")
    for source in sorted((_CUDA / "cuda").glob("*.cu")) if nvcc else []:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                str(nvcc), "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas",
                "-v", f"-I{_CUDA}", "-cubin", "-o", f"{folder}/kernels.cubin", str(source),
            ]  # fmt: skip
            told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for entry in told.split("Compiling entry function")[1:]:
            name = re.search(r"\d([a-z_]+)E", entry.split("'")[1])  # of what is mangled, the last
            registers = re.search(r"Used (\d+) registers", entry)
            spilled = re.search(r"(\d+) bytes spill stores", entry)
            assert registers is not None
            assert spilled is not None
            resident = min(REGISTERS // (int(registers[1]) * 256), 8)
            label = name[1] if name else entry.split("'")[1]
            yield Usage(label, source.name, int(registers[1]), int(spilled[1]), 0, 8, resident)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.registers", description=__doc__)
    parser.add_argument("--out", type=Path, default=_BENCH / "results" / "registers_sm90.json")
    args = parser.parse_args()
    found = []
    for part in (convolutions, convolutions_back, epilogues, messages, cuda_sources):
        for one in part():
            print(json.dumps(asdict(one)), flush=True)
            found.append(one)
    facts = {"target": "sm_90a", "triton": triton.__version__}
    write_json(args.out, {"environment": facts, "rows": [asdict(one) for one in found]})
    spilled = [one for one in found if one.spilled]
    for one in spilled:
        print(f"spills {one.spilled} bytes: {one.kernel}, {one.form}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
