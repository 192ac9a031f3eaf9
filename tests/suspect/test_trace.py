"""The traced graph: what is paired with what, and what is refused by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onp.data import Normalize
from onp.errors import UntraceableModel
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace
from tests.networks import BUILDERS, CONVOLUTIONAL, network


@pytest.mark.parametrize("name", BUILDERS)
def test_the_frozen_network_computes_what_the_module_does(name: str) -> None:
    model = network(name, size=(40, 40))
    images = torch.rand(5, 3, 40, 40)
    with torch.no_grad():
        got = FrozenNetwork(trace(model, (3, 40, 40)), model)(images)
        torch.testing.assert_close(got, model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_what_is_pooled_to_one_pixel_is_flattened(name: str) -> None:
    """The GPU's plan has no picks."""
    kinds = {op.kind for op in trace(network(name), (3, 32, 32)).ops}
    assert "flatten" in kinds
    assert not kinds & {"pick", "select"}


def test_a_pre_activation_norm_reads_the_residual_sum() -> None:
    traced = trace(network("preactresnet18"), (3, 32, 32))
    layers = {layer.name: layer for layer in traced.layers}
    second = layers["layer1.1.bn1"]
    assert [traced.ops[p].module for p in second.producers] == ["layer1.0.conv2", "conv1"]
    assert [traced.ops[c].module for c in second.consumers] == ["layer1.1.conv1"]
    last = traced.layers[-1]  # nothing normalises what the linear layer reads
    assert last.norm is None
    assert [traced.ops[c].module for c in last.consumers] == ["linear"]


def test_residual_channels_share_a_group_and_inner_ones_do_not() -> None:
    traced = trace(network("preactresnet18"), (3, 32, 32))
    groups = {layer.name: traced.group_of_site[layer.sites] for layer in traced.layers}
    assert torch.equal(groups["layer1.0.bn1"], groups["layer1.1.bn1"])
    assert not torch.isin(groups["layer1.0.bn2"], groups["layer1.0.bn1"]).any()


def test_depthwise_input_and_output_are_one_group() -> None:
    traced = trace(network("mobilenetv2"), (3, 32, 32))
    groups = {layer.name: traced.group_of_site[layer.sites] for layer in traced.layers}
    assert torch.equal(groups["layers.1.bn1"], groups["layers.1.bn2"])


def test_normalisation_inside_the_network_is_traced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), network("vgg11_bn"))
    images = torch.rand(2, 3, 32, 32)
    traced = trace(model.eval(), (3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(
            FrozenNetwork(traced, model)(images), model(images), rtol=1e-4, atol=1e-5
        )


class _Functional(nn.Module):
    """The same operations in other clothes: view, mean, max_pool2d, relu as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 5, 2, 2)
        self.two = nn.Conv2d(6, 6, 3, 1, 1, groups=2)
        self.three = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.one(2 * x - 1).relu(), 2)
        x = torch.add(x, F.relu6(self.two(x)))
        return self.three(x.mean((2, 3)).view(x.size(0), -1))


def test_functional_forms_are_traced() -> None:
    torch.manual_seed(0)
    model = _Functional().eval()
    images = torch.rand(3, 3, 16, 20)
    with torch.no_grad():
        got = FrozenNetwork(trace(model, (3, 16, 20)), model)(images)
        torch.testing.assert_close(got, model(images), rtol=1e-4, atol=1e-5)


class _Scaled(nn.Module):
    """A second input, though one with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        x = self.conv(x) * scale
        return self.head((x if mask is None else x * mask).mean((2, 3)))  # type: ignore[no-any-return]


class _Masked(_Scaled):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, mask=mask)


def test_arguments_that_have_a_default_take_it() -> None:
    torch.manual_seed(0)
    model = _Scaled().eval()
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        got = FrozenNetwork(trace(model, (3, 8, 8)), model)(images)
        torch.testing.assert_close(got, model(images), rtol=1e-4, atol=1e-5)


class _ByShape(nn.Module):
    """Code that asks for shapes, types and lengths, and branches on what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        conv = self.small if height < 16 and x.dtype == torch.float32 else self.large
        halves = conv(x).chunk(2, dim=1)
        x = torch.cat([half.relu() for half in halves], dim=1)
        assert x.ndim == len(x.size()) == 4, "maps"
        area = x.size(2) * x.size(3)
        pooled = x.flatten(2).mean(-1) if area > 1 else x.flatten(1)
        return self.head(pooled.view(images, -1) * (width / 8))  # type: ignore[no-any-return]


@pytest.mark.parametrize("side", [8, 20])
def test_branches_on_shapes_are_taken(side: int) -> None:
    torch.manual_seed(0)
    model = _ByShape().eval()
    traced = trace(model, (3, side, side))
    assert traced.ops[1].module == ("small" if side < 16 else "large")
    images = torch.rand(3, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(
            FrozenNetwork(traced, model)(images), model(images), rtol=1e-4, atol=1e-5
        )


@fx.wrap
def _drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    return x if not training or rate == 0 else x / (1 - rate)


@fx.wrap
def _doubled(x: Tensor) -> Tensor:
    return x.mul_(2)


class _Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class _Counting(nn.Module):
    """A buffer that counts the calls, and a norm that learns from the batch."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.learns = training

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        norm = self.norm
        x = F.batch_norm(
            self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.learns
        )
        return self.head(x.mean(axis=(2, 3), keepdims=False))  # type: ignore[no-any-return, call-overload]


@pytest.mark.parametrize("training", [False, True])
def test_tracing_leaves_buffers_as_they_were(training: bool) -> None:
    model = _Counting(training).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if training:
        with pytest.raises(UntraceableModel):
            trace(model, (3, 8, 8))
    else:
        trace(model, (3, 8, 8))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_call_that_does_nothing_is_nothing() -> None:
    """Such as torchvision's stochastic depth; not one that writes into what it gives back."""
    model = _Wrapped(lambda x: _drop_path(x, 0.2, False)).eval()
    assert [op.kind for op in trace(model, (3, 8, 8)).ops[1:4]] == ["conv", "globalpool", "flatten"]
    with pytest.raises(UntraceableModel, match="_doubled is not handled"):
        trace(_Wrapped(lambda x: _doubled(x)).eval(), (3, 8, 8))


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2)), "1: modules of type PixelShuffle"),
        (_Branching(), "_Branching"),
        (_Masked(), "second input, mask"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), "no prunable channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "does not accept images"),
    ],
    ids=["unknown module", "control flow", "two inputs", "no logits", "no channels", "wrong size"],
)
def test_what_cannot_be_traced_is_named(model: nn.Module, named: str) -> None:
    with pytest.raises(UntraceableModel, match=named):
        trace(model.eval(), (3, 32, 32))


class _InPlace(nn.Module):
    """The raw convolution is read after an in-place ReLU changed it: the graph cannot show that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head((x + self.two(self.act(x))).mean((2, 3)))  # type: ignore[no-any-return]


def test_what_was_written_into_since_is_refused() -> None:
    with pytest.raises(UntraceableModel, match="add: reads one, which was written into since"):
        trace(_InPlace().eval(), (3, 8, 8))


def test_a_trace_that_computes_something_else_is_refused() -> None:
    import onp

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    model[0].register_forward_hook(lambda module, inputs, output: 20 * output)  # no part of a graph
    images = torch.rand(30, 3, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    with pytest.raises(UntraceableModel, match="other logits than the module"):
        onp.sanitize(model, [(images, labels)])


def test_threads_that_trace_and_threads_that_answer_do_not_meet() -> None:
    """fx replaces what calls modules in the whole process."""
    model, served = network("preactresnet18"), network("vgg11")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = served(images)
    sites, wrong, done = list[int](), list[Exception](), threading.Event()

    def answer() -> None:
        try:
            with torch.no_grad():
                while not done.is_set():
                    assert torch.equal(served(images), expected)
        except Exception as error:
            wrong.append(error)

    def follow() -> None:
        try:
            sites.extend(trace(copy.deepcopy(model), (3, 32, 32)).sites for _ in range(3))
        except Exception as error:
            wrong.append(error)

    answering = threading.Thread(target=answer)
    tracing = [threading.Thread(target=follow) for _ in range(2)]
    for thread in (answering, *tracing):
        thread.start()
    for thread in tracing:
        thread.join()
    done.set()
    answering.join()
    assert wrong == []
    assert len(sites) == 6
    assert len(set(sites)) == 1
    with torch.no_grad():
        assert torch.equal(served(images), expected)
