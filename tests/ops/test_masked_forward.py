"""Masked forward against plain torch: hooks that zero the consumers' input channels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp import masks
from onp.data import Normalize
from onp.errors import ResourceError, UnsupportedOperation
from onp.ops import masked_forward
from onp.ops.masked_forward import MaskedForwardPlan, lower
from onp.ops.reference import masked_forward as reference
from onp.suspect.network import FrozenNetwork
from onp.suspect.operations import Op
from onp.suspect.trace import Trace, trace
from tests.networks import BUILDERS, network

ISAS = masked_forward.instruction_sets()


def random_masks(batch: int, sites: int, share: float = 0.1, seed: int = 0) -> Tensor:
    """Bool [B, S]: the empty mask, then random ones, neighbours alike in their early sites."""
    generator = torch.Generator().manual_seed(seed)
    pruned = torch.rand(batch, sites, generator=generator) < share
    pruned[:1] = False
    pruned[2::2, : sites * 2 // 3] = pruned[1:-1:2, : sites * 2 // 3]
    return pruned


def expected(model: nn.Module, traced: Trace, pruned: Tensor, images: Tensor) -> Tensor:
    layers = [
        (layer.sites, [str(traced.ops[c].module) for c in layer.consumers])
        for layer in traced.layers
    ]
    return reference(model, layers, pruned, images)


def assert_equals_hooks(
    model: nn.Module, size: tuple[int, int], *, batch: int = 4, count: int = 3, atol: float = 1e-4
) -> None:
    images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))
    traced = trace(model, (3, *size))
    pruned = random_masks(batch, traced.sites)
    want = expected(model, traced, pruned, images)
    plan = lower(traced, model)
    assert plan.num_classes == want.shape[2]
    for isa in ISAS:
        got = plan.run(masks.pack(pruned), images, isa=isa, threads=1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47)], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture_equals_hooks(name: str, size: tuple[int, int]) -> None:
    assert_equals_hooks(network(name, size=size), size)


@pytest.mark.parametrize("name", [n for n in BUILDERS if "res" in n])
def test_small_odd_images(name: str) -> None:
    assert_equals_hooks(network(name), (17, 19), count=5)


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
    images = torch.rand(7, 3, 32, 32)
    packed = masks.pack(random_masks(9, traced.sites))
    base = plan.run(packed, images, share=False, threads=1, isa=isa)
    for threads in (1, 2, 5):
        for share in (True, False):
            for max_bytes in (masked_forward.MAX_BYTES, 3 << 20):
                got = plan.run(
                    packed, images, share=share, threads=threads, isa=isa, max_bytes=max_bytes
                )
                assert torch.equal(got, base), (threads, share, max_bytes)


@pytest.mark.parametrize("name", ["preactresnet18", "mobilenetv2", "densenet", "vit", "convnext"])
def test_what_an_earlier_call_left_in_memory_does_not_matter(name: str) -> None:
    model = network(name)
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    images = torch.rand(7, 3, 32, 32)
    packed = masks.pack(random_masks(2, traced.sites))
    base = plan.run(packed, images)
    other = network("vit")
    spoiling = lower(trace(other, (3, 32, 32)), other)
    spoilt = torch.full_like(images, torch.nan)
    assert spoiling.run(masks.pack(random_masks(1, spoiling.sites)), spoilt).isnan().any()
    for share in (False, True):
        plan.run(packed, spoilt, share=share)
        assert torch.equal(plan.run(packed, images, share=share), base)


def test_sharing_keeps_the_order_of_the_masks() -> None:
    model = network("resnet20")
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    images = torch.rand(2, 3, 32, 32)
    packed = masks.pack(torch.eye(traced.sites, dtype=torch.bool)[torch.randperm(traced.sites)])
    together = plan.run(packed, images)
    for row in (0, 1, traced.sites - 1):
        assert torch.equal(plan.run(packed[row : row + 1], images), together[row : row + 1])


@pytest.mark.parametrize(("batch", "count"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("share", [True, False])
def test_nothing_to_do(batch: int, count: int, share: bool) -> None:
    model = network("vgg11")
    traced = trace(model, (3, 32, 32))
    packed = masks.pack(torch.zeros(batch, traced.sites, dtype=torch.bool))
    got = lower(traced, model).run(packed, torch.rand(count, 3, 32, 32), share=share)
    assert got.shape == (batch, count, 10)


@pytest.mark.parametrize("share", [True, False])
def test_strided_arguments(share: bool) -> None:
    model = network("preactresnet18")
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    pruned = random_masks(6, traced.sites)
    images = torch.rand(6, 3, 32, 32)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    want = plan.run(masks.pack(pruned[::2]), images[::2], share=share)
    assert torch.equal(plan.run(masks.pack(pruned)[::2], channels_last[::2], share=share), want)


def test_half_precision_weights_and_a_plan_of_its_own() -> None:
    model = network("preactresnet18").half()
    traced = trace(model, (3, 32, 32))
    plan = lower(traced, model)
    images = torch.rand(3, 3, 32, 32)
    pruned = random_masks(3, traced.sites)
    want = expected(model.float(), traced, pruned, images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(plan.run(masks.pack(pruned), images), want, rtol=1e-4, atol=1e-4)


def test_normalisation_inside_the_network() -> None:
    assert_equals_hooks(
        nn.Sequential(Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), network("vgg11_bn")).eval(),
        (32, 32),
    )


def test_all_channels_pruned_leaves_the_bias() -> None:
    model = network("preactresnet18")
    traced = trace(model, (3, 32, 32))
    packed = masks.pack(torch.ones(1, traced.sites, dtype=torch.bool))
    got = lower(traced, model).run(packed, torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(got, model.linear.bias.detach().expand(1, 2, -1))  # type: ignore[union-attr]


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_pruned_channels_are_not_multiplied(isa: str, halves: bool) -> None:
    """By convolutions of 3x3 (Winograd in fp32, also of stride 2), 5x5, one pixel, behind pools,
    and by linear layers: their weights for what is pruned are no numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 25, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(25, 33, 3, 2, 1),
        nn.ReLU(), nn.Conv2d(33, 40, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(40, 18), nn.ReLU(), nn.Linear(18, 5),
    ).eval()  # fmt: skip
    traced = trace(model, (3, 24, 24))
    pruned = torch.zeros(1, traced.sites, dtype=torch.bool)
    spoilt, emptied = copy.deepcopy(model), copy.deepcopy(model)
    for layer in traced.layers:
        channels = layer.sites.stop - layer.sites.start
        # Whole pairs, as bf16 is multiplied; the last of an odd number is one by itself.
        some = torch.tensor([2, 3, 12, 13, *((channels - 1,) if channels % 2 else (16, 17))])
        pruned[0, some + layer.sites.start] = True
        for consumer in layer.consumers:
            name = str(traced.ops[consumer].module)
            with torch.no_grad():
                spoilt.get_submodule(name).weight[:, some] = torch.nan
                emptied.get_submodule(name).weight[:, some] = 0.0
    images = torch.rand(5, 3, 24, 24)
    packed = masks.pack(pruned)
    want = lower(traced, emptied, halves=halves).run(packed, images, isa=isa)
    plan = lower(traced, spoilt, halves=halves)
    assert torch.equal(plan.run(packed, images, isa=isa), want)
    assert want.isfinite().all()
    nothing = plan.run(torch.zeros_like(packed), images, isa=isa)
    assert nothing.isnan().all()  # so they would have told


class Odd(nn.Module):
    """What the named architectures lack: every epilogue that needs steps of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, (5, 3), (2, 1), (1, 2), bias=False)
        self.grouped = nn.Conv2d(12, 20, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(20, affine=False)
        self.late = nn.BatchNorm2d(20, eps=0.1)
        self.widening = nn.Conv2d(20, 40, 3, groups=20, bias=False)
        self.dense = nn.Conv2d(40, 20, 1)
        self.branch = nn.BatchNorm2d(20)
        self.hidden = nn.Linear(20 * 4 * 7, 9, bias=False)
        self.feature_norm = nn.BatchNorm1d(9)
        self.last = nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.stem(2 * x - 1)))
        x = F.max_pool2d(self.late(F.relu(self.norm(x))), 3, 2, 1)
        y = self.dense(F.relu6(self.widening(x) + 0.5) * 2)
        y = y + y  # a sum with itself
        y = F.relu(y) + self.branch(y)  # read three times
        y = F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)
        y = F.avg_pool2d(y, 2, 1, 1) + F.max_pool2d(y, 2, 1, 1)
        y = self.hidden(y.flatten(1))
        return self.last(F.relu(self.feature_norm(y)))


class Shared(nn.Module):
    """One value, read unmasked by a norm and a sum and masked by a convolution and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 1)
        self.three = nn.Conv2d(8, 8, 2, 2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.one(x) + self.norm(x)
        y = F.relu(y + x)
        z = self.three(y) + F.max_pool2d(y, 2) + self.two(F.max_pool2d(x, 2))
        return self.last(z.mean((2, 3)))


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


class Narrow(nn.Module):
    """Fewer outputs than a block of channels from more inputs than one, by Winograd."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 17, 3, padding=1)
        self.narrow = nn.Conv2d(17, 5, 3, padding=1)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.narrow(F.relu(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "size"),
    [(Odd, (27, 23)), (Shared, (9, 14)), (Narrow, (32, 32)), (Narrow, (13, 9))],
)
def test_uncommon_networks(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    torch.manual_seed(2)
    assert_equals_hooks(randomised(build()), size, batch=6, count=5)


def test_what_the_engine_lacks_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(UnsupportedOperation, match="undilated"):
        lower(trace(model.eval(), (3, 8, 8)), model)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))
    with pytest.raises(UnsupportedOperation, match="for each of the 4 channels"):
        lower(trace(model.eval(), (3, 4, 4)), model)

    known = trace(network("vgg11"), (3, 32, 32))
    ops = (known.ops[0], Op("softmax", "strange", (0,)), Op("output", "output", (1,)))
    broken = Trace(
        ops, ((3, 1, 1),) * 3, (), known.channels, known.group_of_site[:0], num_classes=3
    )
    with pytest.raises(UnsupportedOperation, match=r"strange .* softmax"):
        lower(broken, nn.Identity())


@pytest.fixture(scope="module")
def plan() -> MaskedForwardPlan:
    model = network("vgg11")
    return lower(trace(model, (3, 32, 32)), model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a | {"packed": a["packed"].int()}, "packed must be int64"),
        (lambda a: a | {"packed": a["packed"][:, 1:]}, "packed must be int64"),
        (lambda a: a | {"images": a["images"].double()}, "images must be float32"),
        (lambda a: a | {"images": a["images"][:, :, 1:]}, "images must be float32"),
        (lambda a: a | {"images": a["images"].to("meta")}, "images must be on the CPU"),
        (lambda a: a | {"threads": 0}, "threads must be positive"),
        (lambda a: a | {"isa": "mmx"}, "isa must be auto or one of"),
    ],
)
def test_wrong_arguments(
    plan: MaskedForwardPlan,
    change: Callable[[dict[str, object]], dict[str, object]],
    match: str,
) -> None:
    arguments: dict[str, object] = {
        "packed": masks.pack(torch.zeros(1, plan.sites, dtype=torch.bool)),
        "images": torch.rand(2, 3, 32, 32),
    }
    with pytest.raises(ValueError, match=match):
        plan.run(**change(arguments))  # type: ignore[arg-type]


def test_too_little_memory(plan: MaskedForwardPlan) -> None:
    packed = masks.pack(torch.zeros(1, plan.sites, dtype=torch.bool))
    with pytest.raises(ResourceError, match="max_bytes must be at least"):
        plan.run(packed, torch.rand(1, 3, 32, 32), max_bytes=1000)


class Between(nn.Module):
    """A convolution, anything, a linear layer."""

    def __init__(self, middle: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Conv2d(3, 32, 4, 4)
        self.places = torch.randn(1, 16, 8)  # no parameter, nor a buffer
        self.norm = nn.LayerNorm(8 * 16)
        self.head = nn.Linear(features, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, x))  # type: ignore[call-arg, arg-type]


def embedded(net: Between, x: Tensor) -> Tensor:
    return F.gelu(net.conv(x).flatten(2).transpose(1, 2) + net.places).mean(1)


def with_dead_ends(net: Between, x: Tensor) -> Tensor:
    y = net.conv(x)
    F.silu(F.relu(y) * 2 - 1)
    return F.relu(y).mean((2, 3))


def saturated(net: Between, x: Tensor) -> Tensor:
    return F.silu(net.conv(x) * 1e4 - 1e4).mean((2, 3))


@pytest.mark.parametrize("middle", [embedded, with_dead_ends, saturated])
def test_rarities(middle: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(4)
    net = Between(middle, 8).eval()
    traced = trace(net, (3, 4, 4))
    plain = FrozenNetwork(traced, net, native=False)
    pruned, images = random_masks(4, traced.sites, 0.3), torch.rand(3, 3, 4, 4)
    with torch.no_grad():
        want = torch.stack([plain(images, gate) for gate in (~pruned).float()])
    for isa in ISAS:
        got = lower(traced, net).run(masks.pack(pruned), images, isa=isa)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def normed_flat(net: Between, x: Tensor) -> Tensor:
    return net.norm(net.conv(x).flatten(1))


def unequal(net: Between, x: Tensor) -> Tensor:
    t = net.conv(x).flatten(2).transpose(1, 2)
    q, k, v = t[:, None, :, :2], t[:, None, :, 2:4], t[:, None, :, 4:]
    return F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1)


def summed(net: Between, x: Tensor) -> Tensor:
    return F.max_pool2d(net.conv(x), 2).flatten(1) + F.relu(net.same(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("middle", "features", "match"),
    [(normed_flat, 128, "flattened"), (unequal, 4, "heads of one size"), (summed, 32, "one shape")],
)
def test_what_rarities_lack_is_named(
    middle: Callable[[Tensor], Tensor], features: int, match: str
) -> None:
    net = Between(middle, features).eval()
    with pytest.raises(UnsupportedOperation, match=match):
        lower(trace(net, (3, 4, 4)), net)
