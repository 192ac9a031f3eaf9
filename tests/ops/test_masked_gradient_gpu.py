"""The GPU's masked gradient against the same frozen network in float64; on a machine without a GPU
its Triton kernels run through the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from onp.ops import masked_gradient_triton as kernels
from onp.ops.masked_gradient_gpu import GpuMaskedGradientPlan, lower
from onp.suspect.replayed import Replayed
from onp.suspect.trace import Trace, trace
from tests.networks import network
from tests.ops.test_masked_forward import randomised
from tests.ops.test_masked_gradient import (
    Joined,
    Results,
    expected,
    gates_for,
    images_of,
    loss,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
NETWORKS = [
    ("preactresnet18", 16), ("resnet20", 16), ("resnet20-option-a", 12), ("vgg16_bn", 32),
    ("mobilenetv2", 8), ("densenet", 8),
]  # fmt: skip


def settled(name: str, size: int) -> tuple[nn.Module, Trace]:
    model = network(name, size=(size, size))
    return model, trace(model, (3, size, size))


def computed(
    plan: GpuMaskedGradientPlan, images: Tensor, gates: Tensor | None, *, moments: bool
) -> Results:
    leaf = images.clone().to(DEVICE).requires_grad_(True)
    gate = None if gates is None else gates.detach().clone().to(DEVICE).requires_grad_(True)
    if moments:
        outputs = plan.with_moments(leaf, gate)
        value = loss(*outputs)
    else:
        outputs = plan(leaf, gate), torch.empty(0), torch.empty(0)
        value = outputs[0].square().sum()
    value.backward()
    assert leaf.grad is not None
    grad = torch.zeros(0) if gate is None or gate.grad is None else gate.grad.cpu()
    return Results(*(x.detach().cpu() for x in outputs), leaf.grad.cpu(), grad)


def assert_close(got: Results, want: Results, tolerance: float, *, moments: bool) -> None:
    """Up to a share of the norm: of an image's gradient in the median, as at kinks single ones may
    be far off."""
    for name in ("logits", "mean", "variance")[: 3 if moments else 1]:
        a, b = getattr(got, name).double(), getattr(want, name)
        assert a.shape == b.shape
        assert float((a - b).norm()) <= tolerance * float(b.norm()), name
    for name in ("images", "gates"):
        a, b = getattr(got, name).double(), getattr(want, name)
        assert a.shape == b.shape
        if b.numel() == 0:
            continue
        flat = b.dim() > 1
        a, b = (x.flatten(1) if flat else x[None] for x in (a, b))
        error = (a - b).norm(dim=1) / b.norm(dim=1)
        assert float(error.median()) < tolerance, (name, error)
        assert float(error.max()) < 3 * max(tolerance, 0.1), (name, error)


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("moments", [False, True], ids=["logits", "moments"])
@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_every_architecture_equals_torch(name: str, size: int, moments: bool, gated: bool) -> None:
    model, traced = settled(name, size)
    images = images_of((size, size), 5)
    gates = gates_for(traced, 5) if gated else None
    want = expected(model, traced, images, gates, moments=moments)
    plan = lower(traced, model, DEVICE, "fp32")
    assert_close(computed(plan, images, gates, moments=moments), want, 1e-4, moments=moments)


def test_concatenations_of_images_and_of_a_value_twice() -> None:
    torch.manual_seed(2)
    model = randomised(Joined())
    traced = trace(model, (3, 8, 8))
    images, gates = images_of((8, 8), 5), gates_for(traced, 5)
    want = expected(model, traced, images, gates, moments=True)
    plan = lower(traced, model, DEVICE, "fp32")
    assert_close(computed(plan, images, gates, moments=True), want, 1e-4, moments=True)
    leaf = gates.clone().to(DEVICE).requires_grad_(True)  # and without the images' gradients
    (alone,) = torch.autograd.grad(plan(images.to(DEVICE), leaf).square().sum(), leaf)
    wanted = expected(model, traced, images, gates, moments=False).gates
    torch.testing.assert_close(alone.cpu().double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["preactresnet18", "resnet20"])
def test_in_tf32(name: str) -> None:
    """At every kink a ReLU may pass on one side alone, so gradients are rougher than logits."""
    model, traced = settled(name, 16)
    images, gates = images_of((16, 16), 5), gates_for(traced, 5)
    want = expected(model, traced, images, gates, moments=True)
    got = computed(lower(traced, model, DEVICE), images, gates, moments=True)
    assert_close(replace(got, images=want.images, gates=want.gates), want, 1e-2, moments=True)
    assert_close(got, want, 0.25, moments=True)


def test_one_row_of_gates_is_for_all_images() -> None:
    model, traced = settled("preactresnet18", 16)
    images, gates = images_of((16, 16), 19), gates_for(traced, 1)[0]
    plan = lower(traced, model, DEVICE, "fp32")
    one = computed(plan, images, gates, moments=False)
    rows = gates.expand(19, -1)
    each = computed(plan, images, rows, moments=False)  # computed() copies: 19 rows
    torch.testing.assert_close(one.logits, each.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.images, each.images, rtol=1e-3, atol=1e-5)
    assert one.gates.shape == gates.shape
    torch.testing.assert_close(one.gates, each.gates.sum(0), rtol=1e-3, atol=1e-4)
    expanded = rows.to(DEVICE).detach().requires_grad_(True)
    logits = plan(images.to(DEVICE), expanded)
    (found,) = torch.autograd.grad(logits.square().sum(), expanded)
    torch.testing.assert_close(found.cpu(), each.gates, rtol=1e-3, atol=1e-5)


def test_only_what_is_wanted_is_computed() -> None:
    """Gradients of gates alone, of one output alone, and none."""
    model, traced = settled("resnet20", 16)
    images, gates = images_of((16, 16), 2).to(DEVICE), gates_for(traced, 2).to(DEVICE)
    plan = lower(traced, model, DEVICE, "fp32")
    want = computed(plan, images, gates, moments=False)
    gates.requires_grad_(True)
    (got,) = torch.autograd.grad(plan(images, gates).square().sum(), gates)
    torch.testing.assert_close(got.cpu(), want.gates, rtol=1e-3, atol=1e-5)
    images.requires_grad_(True)
    mean = plan.with_moments(images)[1]
    (got,) = torch.autograd.grad(mean.square().sum(), images)
    assert got.shape == images.shape
    assert bool(got.any())
    with torch.no_grad():  # nothing is kept, and the outputs are the same
        got = plan.with_moments(images, gates)
    images.requires_grad_(True)
    for alone, kept in zip(got, plan.with_moments(images, gates), strict=True):
        assert not alone.requires_grad
        assert torch.equal(alone, kept.detach())


@pytest.mark.parametrize("second", [1, 2])
def test_gates_of_saturated_activations(second: int) -> None:
    """A gate is behind its activation: what it lets through counts, though no gradient passes."""
    active = torch.tensor([6.0, 0.0, 3.0, 0.0]).repeat(4).expand(16, 2, 2, 16).contiguous()
    ungated, out = torch.full((2, 16, 2, 2, 16), torch.nan, device=DEVICE)
    gates = torch.full((1, 32), 0.5, device=DEVICE)
    reverse = replace(
        kernels.Reverse.nothing(out), second=second, active=active.to(DEVICE), gates=gates,
        ungated=ungated, per_mask=16,
    )  # fmt: skip
    kernels.launch_back(torch.ones(16, 2, 2, 16, device=DEVICE), reverse)
    assert bool((ungated == 1).all())
    passes = (active > 0) & ((active < 6) | (second == 1))
    assert torch.equal(out.cpu(), 0.5 * passes.float())
    found = torch.zeros(16, 16, device=DEVICE)
    kernels.launch_gate_gradient(active.to(DEVICE), ungated, found, 0, 16)
    assert torch.equal(found.cpu(), active.sum((1, 2)))


@pytest.mark.usefixtures("poisoned_empty")
def test_unwritten_memory_is_not_read() -> None:
    model, traced = settled("preactresnet18", 16)
    images, gates = images_of((16, 16), 3), gates_for(traced, 3)
    got = computed(lower(traced, model, DEVICE, "fp32"), images, gates, moments=True)
    assert all(bool(getattr(got, name).isfinite().all()) for name in ("logits", "images", "gates"))


def test_wrong_arguments_are_named() -> None:
    model, traced = settled("resnet20", 8)
    plan = lower(traced, model, DEVICE)
    images = torch.rand(2, 3, 8, 8, device=DEVICE)
    with pytest.raises(ValueError, match="gates must be float32 of shape"):
        plan(images, torch.ones(3, traced.sites, device=DEVICE))
    with pytest.raises(ValueError, match="images must be float32"):
        plan(images.double())
    assert plan.accepts(images)
    assert not plan.accepts(images.to("meta"))


@pytest.mark.gpu
def test_a_captured_pass_gives_the_same() -> None:
    model, traced = settled("preactresnet18", 16)
    plan = lower(traced, model, DEVICE)
    images = images_of((16, 16), 8).to(DEVICE).requires_grad_(True)
    gates = gates_for(traced, 1)[0].to(DEVICE).requires_grad_(True)
    replayed = Replayed(lambda *inputs: (plan(*inputs),), (images, gates))
    for scale in (1.0, 0.5):
        with torch.no_grad():
            given = [(scale * x).requires_grad_(True) for x in (images, gates)]
        want, got = plan(*given), replayed(*given)[0]
        assert torch.equal(want, got)
        pairs = (torch.autograd.grad(x.square().sum(), given) for x in (want, got))
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one, other)
