"""Masked gradient against the same frozen network in torch operations and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor, nn

from onp import _C, masks
from onp.errors import UnsupportedOperation
from onp.ops import masked_forward, masked_forward_gpu, masked_gradient, masked_gradient_gpu
from onp.ops.masked_forward import instruction_sets
from onp.ops.masked_gradient import MaskedGradientPlan, lower, norms_of
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import Trace, trace
from tests.networks import BUILDERS, network
from tests.ops.test_masked_forward import Odd, Shared, randomised

ISAS = instruction_sets()


@dataclass
class Results:
    logits: Tensor
    mean: Tensor
    variance: Tensor
    images: Tensor
    """Gradients of ``loss`` by the images and by the gates."""
    gates: Tensor


def loss(logits: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Of all outputs, with gradients of order one a unit."""
    return logits.square().sum() + (3 * mean - variance).tanh().sum() + (mean * variance).sum()


def gates_for(traced: Trace, count: int) -> Tensor:
    """Float [N, S] in (0, 1], a tenth of them 0."""
    generator = torch.Generator().manual_seed(4)
    gates = 1 - 0.7 * torch.rand(count, traced.sites, generator=generator)
    return gates * (torch.rand(count, traced.sites, generator=generator) > 0.1)


def images_of(size: tuple[int, int], count: int) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def in_float64(traced: Trace, model: nn.Module) -> FrozenNetwork:
    """The network in torch operations."""
    frozen = FrozenNetwork(traced, model, native=False)
    frozen._weights = {
        index: (weight.double(), None if bias is None else bias.double())
        for index, (weight, bias) in frozen._weights.items()
    }
    for affine in frozen._affines.values():
        affine.scale, affine.shift = affine.scale.double(), affine.shift.double()
    return frozen


def outputs_of(
    frozen: FrozenNetwork, images: Tensor, gates: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, mean and variance in torch operations."""
    seen = [(images.new_empty(len(images), 0),) * 2]

    def keep(_: int, values: Tensor) -> None:
        flat = values.reshape(*values.shape[:2], -1)
        seen.append((flat.mean(2), flat.var(2, correction=0)))

    logits = frozen(images, gates, observe_norm=keep)
    mean, variance = (torch.cat(part, 1) for part in zip(*seen, strict=True))
    return logits, mean, variance


def expected(
    model: nn.Module, traced: Trace, images: Tensor, gates: Tensor | None, *, moments: bool
) -> Results:
    leaf = images.double().requires_grad_(True)
    gate = None if gates is None else gates.double().requires_grad_(True)
    outputs = outputs_of(in_float64(traced, model), leaf, gate)
    value = loss(*outputs) if moments else outputs[0].square().sum()
    value.backward()
    assert leaf.grad is not None
    grad = torch.zeros(0) if gate is None or gate.grad is None else gate.grad
    return Results(*(x.detach() for x in outputs), leaf.grad, grad)


def computed(
    plan: MaskedGradientPlan,
    images: Tensor,
    gates: Tensor | None,
    *,
    moments: bool,
    threads: int = 1,
    isa: str = "auto",
    max_workspace: int = masked_gradient.MAX_WORKSPACE,
) -> Results:
    leaf = images.clone().requires_grad_(True)
    gate = None if gates is None else gates.clone().requires_grad_(True)
    options = {"threads": threads, "isa": isa, "max_workspace": max_workspace}
    if moments:
        outputs = plan.with_moments(leaf, gate, **options)  # type: ignore[arg-type]
        value = loss(*outputs)
    else:
        logits = plan(leaf, gate, **options)  # type: ignore[arg-type]
        outputs = logits, torch.empty(0), torch.empty(0)
        value = logits.square().sum()
    value.backward()
    assert leaf.grad is not None
    grad = torch.zeros(0) if gate is None or gate.grad is None else gate.grad
    return Results(*(x.detach() for x in outputs), leaf.grad, grad)


def assert_close(got: Results, want: Results, *, moments: bool) -> None:
    for name in ("logits", "mean", "variance")[: 3 if moments else 1]:
        a, b = getattr(got, name).double(), getattr(want, name)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("images", "gates"):
        a, b = getattr(got, name).double(), getattr(want, name)
        if b.numel() == 0:
            continue
        error = (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
        # A ReLU at its kink, and a maximum that two pixels share, go one way or the other.
        assert float(error.median()) < 1e-4, (name, error)
        assert float(error.max()) < 0.1, (name, error)


def same(a: Results, b: Results) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Results))


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("moments", [False, True], ids=["logits", "moments"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture_equals_torch(name: str, moments: bool, gated: bool) -> None:
    model = network(name)
    images = images_of((32, 32), 3)
    traced = trace(model, (3, 32, 32))
    gates = gates_for(traced, 3) if gated else None
    want = expected(model, traced, images, gates, moments=moments)
    plan = lower(traced, model)
    for isa in ISAS:
        got = computed(plan, images, gates, moments=moments, isa=isa)
        assert_close(got, want, moments=moments)


class Wide(nn.Module):
    """Strides, paddings and kernels that leave gaps or overlap, and a norm on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 18, 3, 2, bias=False)
        self.early = nn.BatchNorm2d(18)
        self.gaps = nn.Conv2d(18, 17, (2, 1), (3, 2), (0, 1))
        self.same = nn.Conv2d(17, 16, 3, padding=1)
        self.full = nn.Conv2d(16, 19, 3, padding=2)
        self.deep = nn.Conv2d(19, 19, 5, 2, 2, groups=19)
        self.norm = nn.BatchNorm2d(19)
        self.one = nn.Conv2d(19, 16, 1, padding=1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(self.start(x))).relu()
        x = nn.functional.max_pool2d(self.gaps(x), 2, 1, 1)
        x = self.same(x).relu()
        x = self.norm(self.deep(self.full(x).relu())).relu()
        return self.last(nn.functional.avg_pool2d(self.one(x), 2, 2).mean((2, 3)))


class Joined(nn.Module):
    """Concatenations: of the images, of a value twice, of what others read too, of a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 17, 3, padding=1)
        self.start = nn.BatchNorm2d(20)
        self.body = nn.Conv2d(20, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(38)
        self.last = nn.Linear(38, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.stem(x).relu(), x], 1)
        z = self.body(self.start(y).relu())
        whole = torch.cat([torch.cat([z], 1), y, z.relu(), x, z], 1)
        return self.last(self.norm(whole).relu().mean((2, 3)))


class Smooth(nn.Module):
    """Every smooth activation before and behind a norm or a sum, behind a layer norm and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 17, 3, padding=1)
        self.norm = nn.BatchNorm2d(17)
        self.body = nn.Conv2d(17, 17, 3, padding=1)
        self.pixels = nn.LayerNorm(17)
        self.last = nn.Linear(17, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        y = nn.functional.gelu(self.norm(x), approximate="tanh")
        x = nn.functional.gelu(self.body(y) + x)
        x = nn.functional.silu(self.pixels(x.permute(0, 2, 3, 1)))
        return self.last(x.mean((1, 2)))


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize(
    ("build", "size"),
    [
        (Odd, (27, 23)), (Shared, (9, 14)), (Wide, (37, 26)), (Wide, (40, 40)),
        (Joined, (9, 14)), (Smooth, (9, 14)),
    ],
)  # fmt: skip
def test_uncommon_networks(
    build: Callable[[], nn.Module], size: tuple[int, int], gated: bool
) -> None:
    torch.manual_seed(2)
    model = randomised(build())
    images = images_of(size, 5)
    traced = trace(model, (3, *size))
    gates = gates_for(traced, 5) if gated else None
    plan = lower(traced, model)
    for moments in [False, True][: 2 if plan.tells_moments else 1]:
        want = expected(model, traced, images, gates, moments=moments)
        for isa in ISAS:
            got = computed(plan, images, gates, moments=moments, isa=isa)
            assert_close(got, want, moments=moments)


def test_finite_differences() -> None:
    """On a network without kinks: the loss is a polynomial of the second degree in every image."""
    torch.manual_seed(0)
    model = randomised(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1),
            nn.AvgPool2d(2), nn.Conv2d(16, 8, 3, padding=1, groups=4), nn.Flatten(),
            nn.Linear(8 * 9, 3),
        )
    )  # fmt: skip
    traced = trace(model, (3, 12, 12))
    plan = lower(traced, model)

    def value(images: Tensor, gates: Tensor) -> Tensor:
        logits, mean, variance = plan.with_moments(images, gates)
        return logits.square().sum() + mean.square().sum() + 2 * variance.sum()

    images, gates = images_of((12, 12), 2), gates_for(traced, 2)
    leaves = images.clone().requires_grad_(True), gates.clone().requires_grad_(True)
    slopes = torch.autograd.grad(value(*leaves), leaves)
    generator = torch.Generator().manual_seed(5)
    for position in (0, 1):
        for _ in range(4):
            way = torch.randn(leaves[position].shape, generator=generator)
            ends = [[images, gates], [images, gates]]
            for sign, end in zip((0.05, -0.05), ends, strict=True):
                end[position] = end[position] + sign * way
            measured = float(value(*ends[0]) - value(*ends[1])) / 0.1
            told = float((slopes[position] * way).sum())
            # In the gates the degree is higher: only the images' quotient is exact.
            assert measured == pytest.approx(told, rel=2e-3 if position == 0 else 5e-2, abs=0.05)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "name",
    [
        "preactresnet18",
        "resnet20-option-a",
        "mobilenetv2",
        "vgg11_bn",
        "densenet",
        "vit",
        "convnext",
    ],
)
def test_options_do_not_change_a_bit(name: str, isa: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    images, gates = images_of((32, 32), 9), gates_for(traced, 9)
    for gate in (None, gates):
        base = computed(plan, images, gate, moments=True, isa=isa)
        for threads, max_workspace in ((2, masked_gradient.MAX_WORKSPACE), (1, 0), (5, 0)):
            got = computed(
                plan, images, gate, moments=True, isa=isa, threads=threads,
                max_workspace=max_workspace,
            )  # fmt: skip
            assert same(got, base), (threads, max_workspace)
        alone = computed(plan, images[4:5], None if gate is None else gate[4:5], moments=True,
                         isa=isa)  # fmt: skip
        for f in fields(Results):
            whole = getattr(base, f.name)
            assert torch.equal(getattr(alone, f.name), whole[4:5] if len(whole) else whole)


@pytest.mark.parametrize("max_workspace", [0, masked_gradient.MAX_WORKSPACE])
@pytest.mark.parametrize("name", ["mobilenetv2", "densenet", "vit", "convnext"])
def test_what_was_in_memory_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, max_workspace: int
) -> None:
    """Every value that is handed out or read again was written first."""
    model = network(name)
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    images, gates = images_of((32, 32), 5), gates_for(traced, 5)
    base = computed(plan, images, gates, moments=True, max_workspace=max_workspace)
    masked_gradient._Workspace._spare.clear()

    def poisoned(*size: object, **kind: object) -> Tensor:
        return torch.full(size, torch.nan, **kind)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    got = computed(plan, images, gates, moments=True, max_workspace=max_workspace)
    monkeypatch.undo()
    masked_gradient._Workspace._spare.clear()
    assert same(got, base)
    for other, size in ((name, (32, 32)), ("preactresnet18", (40, 24))):
        model = network(other)  # what the engine's own memory then holds
        traced = trace(model, (3, *size))
        spoilt = torch.full((9, 3, *size), torch.nan)
        computed(lower(traced, model), spoilt, gates_for(traced, 9), moments=True,
                 max_workspace=max_workspace)  # fmt: skip
    got = computed(plan, images, gates, moments=True, max_workspace=max_workspace)
    assert same(got, base)


def test_one_row_of_gates_and_strided_arguments() -> None:
    model = network("preactresnet18")
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    images, gates = images_of((32, 32), 6), gates_for(traced, 6)
    row = gates[0].clone().requires_grad_(True)
    rows = gates[:1].expand(3, -1).clone().requires_grad_(True)
    strided = images.contiguous(memory_format=torch.channels_last)[::2].requires_grad_(True)
    plain = images[::2].clone().requires_grad_(True)
    one, other = plan(strided, row), plan(plain, rows)
    assert torch.equal(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    assert row.grad is not None
    assert rows.grad is not None
    torch.testing.assert_close(row.grad, rows.grad.sum(0))
    assert strided.grad is not None
    assert plain.grad is not None
    assert torch.equal(strided.grad, plain.grad)
    doubled = gates.repeat(1, 2)[:, : traced.sites]
    assert not doubled.is_contiguous()
    assert torch.equal(plan(images, doubled), plan(images, gates))


def test_only_what_is_asked_for() -> None:
    model = network("resnet20")
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    images, gates = images_of((32, 32), 2), gates_for(traced, 2)
    both = computed(plan, images, gates, moments=False)
    leaf = gates.clone().requires_grad_(True)
    plan(images, leaf).square().sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, both.gates)
    leaf = images.clone().requires_grad_(True)
    plan(leaf, gates).square().sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, both.images)
    with torch.no_grad():
        logits = plan(leaf, gates)
    assert not logits.requires_grad
    assert torch.equal(logits, both.logits)
    assert not plan(images, gates).requires_grad
    # The moments alone, and one of them alone.
    for part in (1, 2):
        leaf = images.clone().requires_grad_(True)
        plan.with_moments(leaf)[part].square().sum().backward()
        other = images.double().requires_grad_(True)
        outputs_of(in_float64(traced, model), other)[part].square().sum().backward()
        assert leaf.grad is not None
        assert other.grad is not None
        assert float((leaf.grad - other.grad).norm() / other.grad.norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_does_not_matter(dtype: torch.dtype) -> None:
    model = network("resnet20-option-a")
    traced = trace(model, (3, 32, 32))
    images, gates = images_of((32, 32), 2), gates_for(traced, 2)
    pruned = masks.pack(torch.zeros(1, traced.sites, dtype=torch.bool))

    def results() -> list[Tensor]:
        plan, leaf = lower(traced, model), images.clone().requires_grad_(True)
        logits, mean, variance = plan.with_moments(leaf, gates)
        (mean.square().sum() + variance.square().sum()).backward()
        assert leaf.grad is not None
        unmasked = masked_forward.lower(traced, model).run(pruned, images)
        return [logits.detach(), mean.detach(), variance.detach(), leaf.grad, unmasked]

    expected = results()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = results()
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("moments", [False, True])
def test_no_images(moments: bool) -> None:
    model = network("vgg11_bn")
    plan = lower(trace(model, (3, 32, 32)), model)
    got = computed(plan, torch.rand(0, 3, 32, 32), None, moments=moments)
    assert got.logits.shape == (0, 10)
    assert got.images.shape == (0, 3, 32, 32)


def test_a_plan_of_its_own() -> None:
    model = network("vgg11_bn")
    plan = lower(trace(model, (3, 32, 32)), model)
    images = images_of((32, 32), 2)
    want = model(images).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(plan(images), want, rtol=1e-4, atol=1e-4)


def test_no_second_derivatives() -> None:
    model = network("vgg11_bn")
    plan = lower(trace(model, (3, 32, 32)), model)
    leaf = images_of((32, 32), 1).requires_grad_(True)
    (slope,) = torch.autograd.grad(plan(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("max_workspace", [0, masked_gradient.MAX_WORKSPACE])
def test_arguments_changed_before_the_backward_pass_are_refused(max_workspace: int) -> None:
    model = network("vgg11_bn")
    traced = trace(model, (3, 32, 32))
    gates = gates_for(traced, 2)[0].requires_grad_(True)
    logits = lower(traced, model)(images_of((32, 32), 2), gates, max_workspace=max_workspace)
    with torch.no_grad():
        gates.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_a_lost_norm_is_told() -> None:
    model = randomised(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 3),
    ))  # fmt: skip
    plan = lower(trace(model, (3, 8, 8)), model)
    assert not plan.tells_moments
    assert torch.isfinite(plan(torch.rand(2, 3, 8, 8))).all()
    with pytest.raises(UnsupportedOperation, match="norm"):
        plan.with_moments(torch.rand(2, 3, 8, 8))
    frozen = FrozenNetwork(trace(model, (3, 8, 8)), model)
    assert frozen.with_moments(torch.rand(2, 3, 8, 8))[1].shape == (2, 16)


@pytest.fixture(scope="module")
def plan() -> MaskedGradientPlan:
    model = network("vgg11_bn")
    return lower(trace(model, (3, 32, 32)), model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a | {"images": a["images"].double()}, "images must be float32"),
        (lambda a: a | {"images": a["images"][:, :, 1:]}, "images must be float32"),
        (lambda a: a | {"images": a["images"].to("meta")}, "images must be on the CPU"),
        (lambda a: a | {"gates": a["gates"].double()}, "gates must be float32"),
        (lambda a: a | {"gates": a["gates"][:, 1:]}, "gates must be float32"),
        (lambda a: a | {"gates": a["gates"][:1]}, "gates must be float32"),
        (lambda a: a | {"gates": a["gates"].to("meta")}, "gates must be on the CPU"),
        (lambda a: a | {"threads": 0}, "threads must be positive"),
        (lambda a: a | {"isa": "mmx"}, "isa must be auto or one of"),
    ],
)
def test_wrong_arguments(
    plan: MaskedGradientPlan,
    change: Callable[[dict[str, object]], dict[str, object]],
    match: str,
) -> None:
    arguments: dict[str, object] = {
        "images": torch.rand(2, 3, 32, 32),
        "gates": torch.rand(2, plan.sites),
    }
    with pytest.raises(ValueError, match=match):
        plan(**change(arguments))  # type: ignore[arg-type]


def test_wrong_programs() -> None:
    step = {
        "kind": 1, "input": 0, "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "groups": 1,
        "count_include_pad": True, "weight": 0, "bias": 0, "residual": -1, "first": 0,
        "others": [], "index": [], "heads": 0, "value": 0.0,
        "plain": -1, "scale": 0, "shift": 0, "second": 0, "site_start": -1, "final": 1,
    }  # fmt: skip
    buffers = [(2, 1, 1), (2, 1, 1)]
    steps = [_C.MaskedForwardStep(**step)]  # type: ignore[arg-type]
    with pytest.raises(Exception, match="norms must be given"):
        _C.MaskedGradientPlan(buffers, steps, [], [], 1, 0, 0)
    with pytest.raises(Exception, match="units must lie"):
        _C.MaskedGradientPlan(buffers, steps, [(-1, 1)], [], 1, 0, 2)


def test_what_gradients_lack_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2), nn.Flatten(), nn.Linear(8 * 16, 3))
    traced = trace(model.eval(), (3, 8, 8))
    with pytest.raises(UnsupportedOperation, match="undilated"):
        lower(traced, model)
    frozen = FrozenNetwork(traced, model)
    leaf = images_of((8, 8), 2).requires_grad_(True)
    (slope,) = torch.autograd.grad(frozen(leaf).square().sum(), leaf)
    other = leaf.detach().requires_grad_(True)
    (expected,) = torch.autograd.grad(model(other).square().sum(), other)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "lacks"), [("vit", "transpose"), ("convnext", "layer_norm")])
def test_what_a_gpu_lacks_is_named(name: str, lacks: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    for plan, name in ((masked_forward_gpu, "forward"), (masked_gradient_gpu, "gradient")):
        with pytest.raises(UnsupportedOperation, match=f"masked_{name}: {lacks}"):
            plan.lower(traced, model, "cpu", "fp32")


@pytest.mark.parametrize(
    "name", ["preactresnet18", "mobilenetv2", "densenet", "vgg11", "vit", "convnext"]
)
def test_frozen_networks_agree(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    images, gates = images_of((32, 32), 3), gates_for(traced, 3)
    rows = []
    for native in (True, False):
        frozen = FrozenNetwork(traced, model, native=native)
        leaves = images.clone().requires_grad_(True), gates.clone().requires_grad_(True)
        logits = frozen(*leaves)
        rows.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), leaves)])
        if norms_of(traced):  # without there is nothing to tell
            rows[-1] += frozen.with_moments(images)
    for got, want in zip(*rows, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-2
