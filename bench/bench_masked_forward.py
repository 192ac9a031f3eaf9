"""Masked forward of a PreActResNet-18 of width 16 against a loop over masks in eager torch.

The baseline is one plain fp32 channels-last forward per mask: pruning by zeroing norms costs it
nothing more. ``python -m bench.bench_masked_forward`` prints one JSON line per row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.peak import best_time
from onp import masks
from onp.evaluate import MaskEvaluator
from onp.ops.masked_forward import MaskedForwardPlan, instruction_sets, lower
from onp.ops.reference import masked_forward as reference
from onp.suspect.architectures import preactresnet
from onp.suspect.trace import Trace, trace

WIDTH = 16
PRUNED = 0.01
LATE = 0.25  # share of the layers, from the end, in which late masks differ


@dataclass(frozen=True)
class Case:
    """One network with its plan, images and two sets of masks."""

    model: nn.Module
    traced: Trace
    plan: MaskedForwardPlan
    images: Tensor
    independent: Tensor
    """Packed masks that prune 1% of all sites, each its own."""
    late: Tensor
    """Packed masks that agree but for the last quarter of the layers."""
    flops: int
    """Multiplications and additions of one image, direct convolutions."""


def build(batch: int, count: int) -> Case:
    """The case with ``batch`` masks and ``count`` images, behind its correctness gate."""
    torch.manual_seed(0)
    model = preactresnet.of_width(WIDTH, 10).eval()
    traced = trace(model, (3, 32, 32))
    images = torch.rand(count, 3, 32, 32)
    independent = torch.rand(batch, traced.sites) < PRUNED
    late = independent.clone()
    boundary = traced.layers[int(len(traced.layers) * (1 - LATE))].start
    late[:, :boundary] = late[:1, :boundary]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images[:1])
    plan = lower(traced, model)
    case = Case(
        model, traced, plan, images, masks.pack(independent), masks.pack(late),
        counter.get_total_flops(),
    )  # fmt: skip
    layers = [
        (layer.sites, [str(traced.ops[c].module) for c in layer.consumers])
        for layer in traced.layers
    ]
    for pruned in (independent[:2], late[-2:]):
        want = reference(model, layers, pruned, images[:8])
        for isa in instruction_sets():
            got = plan.run(masks.pack(pruned), images[:8], isa=isa)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    return case


def eager_forward(case: Case) -> Callable[[], Tensor]:
    """One mask's forward in eager torch, channels last."""
    model = case.model.to(memory_format=torch.channels_last)
    images = case.images.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.no_grad():
            return model(images)

    return run


def gemm_gflops(threads: int) -> float:
    """What torch's matrix product reaches: a rough peak of this machine now, in GFLOP/s."""
    torch.set_num_threads(threads)
    size = 1024
    a, b = torch.rand(size, size), torch.rand(size, size)
    return 2 * size**3 / best_time(lambda: a @ b, 20) / 1e9


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--masks", type=int, default=64)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    options = parser.parse_args()
    case = build(options.masks, options.images)
    threads = sorted(set(options.threads))

    eager: dict[int, float] = {}
    for count in threads:
        torch.set_num_threads(count)
        eager[count] = best_time(eager_forward(case), options.repeats)
    baseline = min(eager.values())

    def row(name: str, count: int, seconds_per_mask: float, peak: float) -> None:
        gflops = case.flops * options.images / seconds_per_mask / 1e9
        print(
            json.dumps(
                {
                    "bench": "masked_forward",
                    "row": name,
                    "masks": options.masks,
                    "images": options.images,
                    "threads": count,
                    "isa": instruction_sets()[0],
                    "ms_per_mask": round(seconds_per_mask * 1e3, 2),
                    "effective_gflops": round(gflops, 1),
                    "of_gemm": round(gflops / peak, 2),
                    "times_faster_than_best_eager": round(baseline / seconds_per_mask, 2),
                }
            ),
            flush=True,
        )

    for count in threads:
        peak = gemm_gflops(count)
        row("torch eager, a forward per mask", count, eager[count], peak)
        for name, packed, share in (
            ("independent masks", case.independent, False),
            ("independent masks, shared prefixes", case.independent, True),
            ("late masks, shared prefixes", case.late, True),
        ):
            seconds = best_time(
                lambda packed=packed, share=share, count=count: case.plan.run(
                    packed, case.images, share=share, threads=count
                ),
                options.repeats,
            )
            row(name, count, seconds / options.masks, peak)


@pytest.fixture(scope="module")
def case() -> Case:
    return build(8, 64)


def test_eager_forward(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark(eager_forward(case))


@pytest.mark.parametrize("isa", instruction_sets())
def test_independent_masks(benchmark: BenchmarkFixture, case: Case, isa: str) -> None:
    benchmark(case.plan.run, case.independent, case.images, share=False, isa=isa)


@pytest.mark.parametrize("masks_of", ["independent", "late"])
def test_shared_prefixes(benchmark: BenchmarkFixture, case: Case, masks_of: str) -> None:
    benchmark(case.plan.run, getattr(case, masks_of), case.images, share=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["evaluator", "eager"])
def test_on_cuda(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    """The GPU plan against plain forwards."""
    evaluator = MaskEvaluator(case.traced, case.model, backend="native", device="cuda")
    pruned = masks.unpack(case.independent, case.traced.sites)
    model, images = case.model.cuda(), case.images.cuda()

    def evaluate() -> None:
        evaluator.run(pruned, images)
        torch.cuda.synchronize()

    def eager() -> None:
        with torch.no_grad():
            for _ in pruned:
                model(images)
        torch.cuda.synchronize()

    expected = case.plan.run(case.independent[:2], case.images)
    found = evaluator.run(pruned[:2], images, exact=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    benchmark(evaluate if way == "evaluator" else eager)
    case.model.cpu()


if __name__ == "__main__":
    main()
