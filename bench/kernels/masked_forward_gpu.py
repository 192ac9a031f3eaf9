"""Masked forward on a GPU: every mask on every image."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.kernels.gated import gated, gates_of
from bench.kernels.masked_forward import (
    LAST,
    SHARES,
    Case,
    Run,
    Way,
    cases,
    eager,
    edited,
    measure,
)
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row
from onp.ops import masked_forward_gpu
from onp.ops._gpu_program import Precision

LARGEST = "preactresnet18-64"
TARGETS = {LARGEST: 1.5}
"""Ratio to the best baseline that is aimed at in reduced precision."""
OTHERS = ("preactresnet18-16", "mobilenetv2-1", "resnet20-16", "vgg16_bn-64")
SIZES = {False: (256, 512), True: (64, 512)}
"""Masks and images; if quick."""


def on_gpu(case: Case) -> Case:
    """The case with all its tensors there."""
    model = copy.deepcopy(case.model).cuda()
    return replace(
        case, model=model, network=gated(model, case.trace), images=case.images.cuda(),
        pruned=case.pruned.cuda(),
    )  # fmt: skip


def ours(precision: Precision, case: Case) -> Run:
    """The GPU plan."""
    plan = masked_forward_gpu.lower(case.trace, case.model, "cuda", precision)
    return lambda pruned: plan.run(pruned, case.images)


def autotuned(case: Case) -> Run:
    """torch.compile with all it knows, CUDA graphs among it, in bf16."""
    network = copy.deepcopy(case.network).to(torch.bfloat16, memory_format=LAST)
    call = torch.compile(network, mode="max-autotune")
    images = case.images.to(torch.bfloat16).contiguous(memory_format=LAST)

    def run(pruned: Tensor) -> Tensor:
        with torch.no_grad():  # the next call overwrites what a CUDA graph gave
            found = [call(images, g).clone() for g in gates_of(pruned).bfloat16()]
        return torch.stack(found).float()

    return run


def tf32(make: Way) -> Way:
    """A way with convolutions and products in TF32."""

    def made(case: Case) -> Run:
        run = make.make(case)

        def in_tf32(pruned: Tensor) -> Tensor:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
                    return run(pruned)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return in_tf32

    return Way(f"{make.name}, tf32", "tf32", made)


BF16 = torch.bfloat16
WAYS = (
    Way("onp", "reduced", partial(ours, "bf16"), every_mask=True, depends=True),
    Way("onp", "tf32", partial(ours, "tf32"), every_mask=True),
    Way("onp", "fp32", partial(ours, "fp32")),
    Way("torch eager, channels last, bf16", "reduced", eager(LAST, BF16)),
    Way("torch.compile, bf16", "reduced", eager(LAST, BF16, compiled=True)),
    Way("torch eager, channels last", "fp32", eager(LAST)),
    Way("torch.compile", "fp32", eager(LAST, compiled=True)),
    tf32(Way("torch.compile", "tf32", eager(LAST, compiled=True))),
    tf32(Way("torch eager, channels last", "tf32", eager(LAST))),
    tf32(Way("weights edited, channels last", "tf32", edited(LAST))),
)
AUTOTUNED = Way("torch.compile, max-autotune, bf16", "reduced", autotuned)
"""Minutes to compile: on one network."""


def rows(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """Every implementation on the largest network; what takes minutes to compile last."""
    ways = WAYS if quick else (*WAYS, AUTOTUNED)
    for case in cases(LARGEST, *SIZES[quick], SHARES[:1]):
        yield from measured(case, ways, repeats, ceilings)


def others(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """Every implementation on the other networks; none of them if quick."""
    for network in () if quick else OTHERS:
        for case in cases(network, *SIZES[quick], SHARES[:1]):
            yield from measured(case, WAYS, repeats, ceilings)


def measured(case: Case, ways: Sequence[Way], repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """A row for each way."""
    aimed = TARGETS.get(case.name.partition(",")[0])
    case = replace(on_gpu(case), targets={} if aimed is None else {"reduced": aimed})
    for way in ways:
        print(f"{case.name}: {way.name}", file=sys.stderr, flush=True)
        exact = way.precision == "fp32"
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=not exact):
            yield measure(case, way, repeats, ceilings.gflops(way.precision))
