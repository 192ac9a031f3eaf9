"""Neuron graph kernels on the convolutions of PreActResNet-18, width 64 (11 million weights).

Baseline: the same results with torch operations. The cosine baseline computes the whole matrix
with one matrix product.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from onp.ops.neuron_graph import (
    connection_strength,
    connection_strengths,
    similarity_edges,
    strongest_edges,
)

NEIGHBOURS = 8
THRESHOLD = 0.5


Shape = tuple[int, int, int, int]


def shapes(first: int = 64) -> list[Shape]:
    """The convolutions of PreActResNet-18 of a width."""
    found = [(first, 3, 3, 3)]
    before = first
    for width in (first, 2 * first, 4 * first, 8 * first):
        found += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3]
        if width != before:
            found.append((width, before, 1, 1))
        before = width
    return found


def resnet50() -> list[Shape]:
    """The convolutions of ResNet-50."""
    found, before = [(64, 3, 7, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                found.append((4 * width, before, 1, 1))
            before = 4 * width
    return found


NETWORKS = {"width 64": shapes(64), "ResNet-50": resnet50(), "width 192": shapes(192)}
"""11, 23 and 100 million weights."""


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes()]


@pytest.fixture(scope="module")
def strengths(weights: list[Tensor]) -> list[Tensor]:
    return [connection_strength(weight) for weight in weights]


def torch_strength(weight: Tensor) -> Tensor:
    return weight.abs().sum((2, 3))


def torch_choose(matrix: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    score = matrix.masked_fill(~allowed, -torch.inf)
    keep = torch.zeros_like(allowed)
    for dim in (0, 1):
        top = score.topk(min(k, matrix.shape[dim]), dim).indices
        keep.scatter_(dim, top, True)
    rows, cols = (keep & allowed).nonzero(as_tuple=True)
    return rows, cols, matrix[rows, cols]


def torch_strongest(strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch_choose(strength, strength > 0, NEIGHBOURS)


def torch_similar(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    units = torch.nn.functional.normalize(vectors)
    similarity = units @ units.T
    allowed = similarity >= THRESHOLD
    allowed.fill_diagonal_(False)
    return torch_choose(similarity, allowed, NEIGHBOURS)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_strength(benchmark: BenchmarkFixture, weights: list[Tensor], backend: str) -> None:
    run = connection_strength if backend == "native" else torch_strength
    for weight in weights:
        torch.testing.assert_close(run(weight), weight.double().abs().sum((2, 3)).float())
    benchmark(lambda: [run(weight) for weight in weights])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_strongest(benchmark: BenchmarkFixture, strengths: list[Tensor], backend: str) -> None:
    def native(strength: Tensor) -> tuple[Tensor, ...]:
        return strongest_edges(strength, NEIGHBOURS)

    run = native if backend == "native" else torch_strongest
    for strength in strengths:
        assert all(map(torch.equal, run(strength), native(strength)))
    benchmark(lambda: [run(strength) for strength in strengths])


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("case", ["layers", "n512-d1024"])
def test_similar(
    benchmark: BenchmarkFixture, strengths: list[Tensor], case: str, backend: str
) -> None:
    vectors = strengths if case == "layers" else [torch.rand(512, 1024)]

    def native(vectors: Tensor) -> tuple[Tensor, ...]:
        return similarity_edges(vectors, THRESHOLD, NEIGHBOURS)

    run = native if backend == "native" else torch_similar
    for matrix in vectors:
        torch.testing.assert_close(
            native(matrix)[2].sum(), torch_similar(matrix)[2].sum(), rtol=1e-5, atol=1e-5
        )
    benchmark(lambda: [run(matrix) for matrix in vectors])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_strength_on_cuda(benchmark: BenchmarkFixture, weights: list[Tensor], backend: str) -> None:
    on_device = [weight.cuda() for weight in weights]

    def of_torch(weights: list[Tensor]) -> list[Tensor]:
        return [torch_strength(weight) for weight in weights]

    of_layers = connection_strengths if backend == "native" else of_torch

    def run() -> list[Tensor]:
        strengths = of_layers(on_device)
        torch.cuda.synchronize()
        return strengths

    for got, weight in zip(run(), on_device, strict=True):
        torch.testing.assert_close(got, torch_strength(weight))
    benchmark(run)
