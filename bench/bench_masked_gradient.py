"""Forward and gradient of networks of the core set with frozen weights, native against eager torch.

The baseline is the same frozen network in eager fp32 torch (norms folded, channels last) with
autograd. ``python -m bench.bench_masked_gradient`` prints one JSON line per network and case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.zoo.checkpoints import load_set
from onp.ops.masked_forward import instruction_sets
from onp.suspect.architectures import preactresnet
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace

MODELS = Path(__file__).parent / "zoo" / "models"
NETWORKS = ("preactresnet18-16_sig", "resnet20-16_ssba", "mobilenetv2-0.25_lf")
CASES = ("forward", "image gradient", "gate gradient", "gradient with moments")
IMAGES = 48


def work(frozen: FrozenNetwork, images: Tensor, case: str) -> Callable[[], list[Tensor]]:
    """One run of a case: its results, for the correctness gate."""
    gates = torch.full((len(images), frozen.trace.sites), 0.9)

    def run() -> list[Tensor]:
        if case == "forward":
            with torch.no_grad():
                return [frozen(images)]
        if case == "gate gradient":
            leaf = gates.clone().requires_grad_(True)
            logits = frozen(images, leaf)
            return [logits.detach(), *torch.autograd.grad(logits.logsumexp(1).sum(), leaf)]
        leaf = images.clone().requires_grad_(True)
        if case == "image gradient":
            logits = frozen(leaf)
            return [logits.detach(), *torch.autograd.grad(logits.logsumexp(1).sum(), leaf)]
        logits, mean, variance = frozen.with_moments(leaf)
        loss = mean.square().sum() + variance.square().sum()
        return [mean.detach(), variance.detach(), *torch.autograd.grad(loss, leaf)]

    return run


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one run: other processes do not count, but for the caches they take."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def check(native: list[Tensor], eager: list[Tensor]) -> None:
    """The correctness gate; a ReLU at its kink may pass a gradient on one side alone."""
    for got, want in zip(native, eager, strict=True):
        assert float((got - want).norm() / want.norm()) < 2e-2


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for zoo in load_set("core", MODELS):
        if not any(name in zoo.name for name in NETWORKS):
            continue
        traced = trace(zoo.model, (3, 32, 32))
        networks = [FrozenNetwork(traced, zoo.model, native=native) for native in (True, False)]
        images = torch.rand(options.images, 3, 32, 32)
        for case in CASES:
            runs = [work(network, images, case) for network in networks]
            check(runs[0](), runs[1]())
            times = [[seconds(run) for run in runs] for _ in range(options.repeats)]
            native, eager = (min(column) for column in zip(*times, strict=True))
            each = 1e3 / options.images
            row = {
                "bench": "masked_gradient",
                "network": zoo.name,
                "row": case,
                "images": options.images,
                "threads": options.threads,
                "isa": instruction_sets()[0],
                "native_ms_per_image": round(native * each, 3),
                "eager_ms_per_image": round(eager * each, 3),
                "times_faster": round(eager / native, 2),
            }
            print(json.dumps(row), flush=True)


@pytest.mark.parametrize("native", [True, False], ids=["native", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_case(benchmark: BenchmarkFixture, case: str, native: bool) -> None:
    torch.manual_seed(0)
    model = preactresnet.of_width(16, 10).eval()
    frozen = FrozenNetwork(trace(model, (3, 32, 32)), model, native=native)
    benchmark(work(frozen, torch.rand(IMAGES, 3, 32, 32), case))


if __name__ == "__main__":
    main()
