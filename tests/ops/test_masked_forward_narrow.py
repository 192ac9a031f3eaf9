"""Masked forwards with convolutions of 8 bits and of bf16: close to fp32, the same whatever the
options are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onp import masks
from onp.ops import masked_forward
from onp.ops.masked_forward import MaskedForwardPlan, lower
from onp.suspect.trace import Trace, trace
from tests.networks import BUILDERS, network

ISAS = masked_forward.instruction_sets()
WORST = {
    "int8": {"vgg16_bn": 0.1, "mobilenetv2": 0.4, "mobilenetv3": 0.15},
    "bf16": {"mobilenetv2": 0.1, "mobilenetv3": 0.04},
}
"""Largest error of a logit, relative to the largest logit, where it is more than usual: with random
weights all images get much the same logits, and errors add up over many layers."""


def drawn(traced: Trace, count: int, batch: int) -> tuple[Tensor, Tensor]:
    """Packed masks, the first empty, and images."""
    random = torch.Generator().manual_seed(0)
    pruned = torch.rand(batch, traced.sites, generator=random) < 0.05
    pruned[0] = False
    return masks.pack(pruned), torch.rand(count, *traced.shapes[0], generator=random)


def narrowed(
    traced: Trace, model: nn.Module, precision: str, packed: Tensor, images: Tensor
) -> MaskedForwardPlan:
    """The plan in less than fp32."""
    if precision == "bf16":
        return lower(traced, model, halves=True)
    return lower(traced, model, lower(traced, model).measure_ranges(packed, images))


def calibrated(
    name: str, precision: str = "int8"
) -> tuple[MaskedForwardPlan, MaskedForwardPlan, Tensor, Tensor]:
    """The plan in fp32, the one in less, and what to run them on."""
    model = network(name)
    traced = trace(model, (3, 32, 32))
    packed, images = drawn(traced, 5, 4)
    return lower(traced, model), narrowed(traced, model, precision, packed, images), packed, images


PRECISIONS = pytest.mark.parametrize("precision", ["int8", "bf16"])


@PRECISIONS
@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture_is_close_to_fp32(name: str, precision: str) -> None:
    exact, rough, packed, images = calibrated(name, precision)
    assert exact.narrow_convolutions == 0
    assert rough.narrow_convolutions > 0
    want = exact.run(packed, images)
    for isa in ISAS:
        got = rough.run(packed, images, isa=isa)
        worst = float((got - want).abs().max() / want.abs().max())
        assert 0 < worst < WORST[precision].get(name, 0.05 if precision == "int8" else 0.02)


@PRECISIONS
@pytest.mark.parametrize("name", ["preactresnet18", "mobilenetv2"])
@pytest.mark.parametrize("isa", ISAS)
def test_options_do_not_change_a_bit(name: str, isa: str, precision: str) -> None:
    _, rough, packed, images = calibrated(name, precision)
    once = rough.run(packed, images, isa=isa, threads=1, share=False)
    for share in (False, True):
        for threads in (1, 3):
            again = rough.run(packed, images, isa=isa, threads=threads, share=share)
            assert torch.equal(again, once)
    parts = [rough.run(packed, one[None], isa=isa) for one in images]
    assert torch.equal(torch.cat(parts, 1), once)


class Chain(nn.Module):
    """A convolution whose rounding can be followed by hand: it reads a copy of the image."""

    def __init__(self, channels: int = 16, stride: int = 1) -> None:
        super().__init__()
        self.copy = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv = nn.Conv2d(channels, 20, 3, padding=1, stride=stride)
        self.linear = nn.Linear(20, 3)
        nn.init.dirac_(self.copy.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.copy(x)).relu()
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("signed", [False, True])
def test_equals_rounding_by_hand(signed: bool) -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    images = torch.rand(2, 16, 9, 7) - (0.5 if signed else 0.0)
    traced = trace(model, (16, 9, 7))
    packed = masks.pack(torch.zeros(1, traced.sites, dtype=torch.bool))
    exact = lower(traced, model)
    rough = lower(traced, model, exact.measure_ranges(packed, images))
    assert rough.narrow_convolutions == 1
    room = 1.5  # that the plan leaves beyond the ranges
    levels = (127 if signed else 255) / (room * images.abs().amax((0, 2, 3)))
    steps = levels.view(16, 1, 1)
    weight = model.conv.weight.data / levels.view(16, 1, 1)
    unit = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    model.conv.weight.data = (weight / unit).round() * unit * levels.view(16, 1, 1)
    want = model((images * steps).round() / steps)
    for isa in ISAS:
        got = rough.run(packed, images, isa=isa)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 17, 31, 48])
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_bf16_by_hand(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    model = Chain(channels, stride).eval()
    images = torch.randn(3, channels, 5, 5)  # where Winograd would take small tiles
    images[0, 0, 0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3e38, 1e-42])  # ties, the ends
    traced = trace(model, (channels, 5, 5))
    packed = masks.pack(torch.zeros(1, traced.sites, dtype=torch.bool))
    rough = lower(traced, model, halves=True)
    assert rough.narrow_convolutions == 1
    model.conv.weight.data = model.conv.weight.data.bfloat16().float()
    want = model(images.bfloat16().float())
    scale = float(want[1:].detach().abs().max())
    for isa in ISAS:
        got = rough.run(packed, images, isa=isa)[0]
        torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=0)


class Joined(nn.Module):
    """An odd number of channels side by side, read as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 9, 1)
        self.conv = nn.Conv2d(17, 20, 3, padding=1, stride=2)
        self.linear = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.cat([self.one(x), self.other(x)], 1).relu()).relu()
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


@PRECISIONS
def test_what_was_left_in_memory_reaches_no_odd_pair(precision: str) -> None:
    torch.manual_seed(0)
    model = Joined().eval()
    traced = trace(model, (3, 9, 7))
    images = torch.rand(2, 3, 9, 7)
    packed = masks.pack(torch.zeros(1, traced.sites, dtype=torch.bool))
    rough = narrowed(traced, model, precision, packed, images)
    assert rough.narrow_convolutions == 1
    exact = lower(traced, model).run(packed, images)
    poison = Chain(48).eval()  # its Winograd convolution's scratch lies where a row's lies here
    poisoning = trace(poison, (48, 9, 7))
    nothing = masks.pack(torch.zeros(1, poisoning.sites, dtype=torch.bool))
    bad = torch.full((2, 48, 9, 7), float("nan"))
    for isa in ISAS:
        lower(poisoning, poison).run(nothing, bad, isa=isa, threads=1)  # leaves NaNs in memory
        got = rough.run(packed, images, isa=isa, threads=1)
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bf16_passes_on_what_is_not_finite(bad: float) -> None:
    torch.manual_seed(0)
    model = Chain(16, 2).eval()
    images = torch.rand(2, 16, 9, 7)
    images[0, 3, 4, 4] = bad
    traced = trace(model, (16, 9, 7))
    packed = masks.pack(torch.zeros(1, traced.sites, dtype=torch.bool))
    rough = lower(traced, model, halves=True)
    for isa in ISAS:
        found = rough.run(packed, images, isa=isa)[0]
        assert not bool(found[0].isfinite().all())
        assert bool(found[1].isfinite().all())


def test_ranges_are_of_all_masks_and_images() -> None:
    exact, _, packed, images = calibrated("vgg16_bn")
    together = exact.measure_ranges(packed, images)
    apart = [exact.measure_ranges(mask[None], image[None]) for mask in packed for image in images]
    for number, (buffer, lowest, highest) in enumerate(together):
        same = [ranges[number] for ranges in apart]
        assert {one[0] for one in same} == {buffer}
        assert lowest == min(one[1] for one in same)
        assert highest == torch.tensor([one[2] for one in same]).amax(0).tolist()


def test_wrong_arguments() -> None:
    exact, _, packed, images = calibrated("resnet20")
    model = network("resnet20")
    ranges = exact.measure_ranges(packed, images)
    with pytest.raises(ValueError, match="or for halves"):
        lower(trace(model, (3, 32, 32)), model, ranges, halves=True)
    with pytest.raises(ValueError, match="packed must be"):
        exact.measure_ranges(packed[:, :1], images)
    with pytest.raises(ValueError, match="images must be"):
        exact.measure_ranges(packed, images[:, :2])
    with pytest.raises(ValueError, match="isa must be"):
        exact.measure_ranges(packed, images, isa="mmx")
