"""Passes captured as CUDA graphs against the same in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from onp.suspect.network import MOST_GRAPHS, REPLAYED_FROM, FrozenNetwork
from onp.suspect.trace import trace
from tests.networks import network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's, from its own thread
]
NETWORKS = ["preactresnet18", "resnet20-option-a", "vit", "densenet"]


def frozen(name: str) -> FrozenNetwork:
    model = network(name)
    return FrozenNetwork(trace(model, (3, 32, 32)), model, "cuda")


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(
        got, want, rtol=1e-3, atol=1e-4 + 1e-3 * float(want.detach().abs().max())
    )


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_by_images_and_gates(name: str) -> None:
    net = frozen(name)
    generator = torch.Generator().manual_seed(0)
    for call in range(REPLAYED_FROM + 2):
        images = torch.rand(5, 3, 32, 32, generator=generator)
        gates = torch.rand(5, net.trace.sites, generator=generator)
        pull = torch.randn(5, net.trace.num_classes, generator=generator).cuda()
        leaves = (
            images.cuda().requires_grad_(True), gates.cuda().requires_grad_(True)
        )  # fmt: skip
        logits = net(*leaves)
        found = torch.autograd.grad(logits, leaves, pull)
        want = net._run(*leaves, None, None)
        close(logits, want)
        for got, expected in zip(found, torch.autograd.grad(want, leaves, pull), strict=True):
            close(got, expected)
        assert bool(net._graphs) == (call + 1 >= REPLAYED_FROM)


def test_moments() -> None:
    net = frozen("preactresnet18")
    for _ in range(REPLAYED_FROM + 1):
        images = torch.rand(4, 3, 32, 32).cuda().requires_grad_(True)
        outputs = net.with_moments(images)
        want = net._moments(images)
        for got, expected in zip(outputs, want, strict=True):
            close(got, expected)
        loss = outputs[0].square().sum() + outputs[1].sum() - outputs[2].sum()
        expected_loss = want[0].square().sum() + want[1].sum() - want[2].sum()
        close(torch.autograd.grad(loss, images)[0], torch.autograd.grad(expected_loss, images)[0])
    assert net._graphs


def test_two_calls_before_their_backward_passes() -> None:
    net = frozen("preactresnet18")
    batches = [torch.rand(3, 3, 32, 32).cuda().requires_grad_(True) for _ in range(2)]
    for _ in range(REPLAYED_FROM):
        net(batches[0])
    first, second = net(batches[0]), net(batches[1])
    assert net._graphs
    for images, logits in ((batches[0], first), (batches[1], second)):
        want = net._run(images, None, None, None)
        close(logits, want)
        (got,) = torch.autograd.grad(logits.square().sum(), images)
        close(got, torch.autograd.grad(want.square().sum(), images)[0])


def test_two_backward_passes_of_one_call() -> None:
    net = frozen("resnet20-option-a")
    images = torch.rand(3, 3, 32, 32).cuda().requires_grad_(True)
    for _ in range(REPLAYED_FROM):
        logits = net(images)
    assert net._graphs
    for pull in (torch.ones_like(logits), torch.randn_like(logits)):
        want = net._run(images, None, None, None)
        (got,) = torch.autograd.grad(logits, images, pull, retain_graph=True)
        close(got, torch.autograd.grad(want, images, pull)[0])


class Picking(nn.Module):
    """Reads every other row and column."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x)[:, :, ::2, ::2].relu().mean((2, 3)))


def test_places_are_picked_on_the_device() -> None:
    model = Picking().eval()
    net = FrozenNetwork(trace(model, (3, 8, 8)), model, "cuda")
    for _ in range(REPLAYED_FROM + 1):
        images = torch.rand(3, 3, 8, 8).cuda().requires_grad_(True)
        close(net(images), net._run(images, None, None, None))
    assert net._graphs


def test_few_graphs_are_kept() -> None:
    net = frozen("resnet20-option-a")
    for count in range(1, MOST_GRAPHS + 3):
        images = torch.rand(count, 3, 32, 32).cuda().requires_grad_(True)
        for _ in range(REPLAYED_FROM):
            net(images).sum().backward()
    assert len(net._graphs) == MOST_GRAPHS


def test_without_gradients_nothing_is_captured() -> None:
    net = frozen("resnet20-option-a")
    for _ in range(REPLAYED_FROM + 1):
        net(torch.rand(2, 3, 32, 32))
    assert not net._graphs
