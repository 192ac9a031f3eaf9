"""Masked forwards with 8-bit convolutions: close to fp32, the same whatever the options are."""

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
WORST = {"vgg16_bn": 0.1, "mobilenetv2": 0.4}
"""Largest error of a logit, relative to the largest logit, where it is more than usual: with random
weights all images get much the same logits, and errors add up over many layers."""


def drawn(traced: Trace, count: int, batch: int) -> tuple[Tensor, Tensor]:
    """Packed masks, the first empty, and images."""
    random = torch.Generator().manual_seed(0)
    pruned = torch.rand(batch, traced.sites, generator=random) < 0.05
    pruned[0] = False
    return masks.pack(pruned), torch.rand(count, *traced.shapes[0], generator=random)


def calibrated(name: str) -> tuple[MaskedForwardPlan, MaskedForwardPlan, Tensor, Tensor]:
    """The plan in fp32, the one in 8 bits, and what to run them on."""
    model = network(name)
    traced = trace(model, (3, 32, 32))
    packed, images = drawn(traced, 5, 4)
    exact = lower(traced, model)
    return exact, lower(traced, model, exact.measure_ranges(packed, images)), packed, images


@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture_is_close_to_fp32(name: str) -> None:
    exact, rough, packed, images = calibrated(name)
    assert exact.byte_convolutions == 0
    assert rough.byte_convolutions > 0
    want = exact.run(packed, images)
    for isa in ISAS:
        got = rough.run(packed, images, isa=isa)
        worst = float((got - want).abs().max() / want.abs().max())
        assert 0 < worst < WORST.get(name, 0.05)


@pytest.mark.parametrize("name", ["preactresnet18", "mobilenetv2"])
@pytest.mark.parametrize("isa", ISAS)
def test_options_do_not_change_a_bit(name: str, isa: str) -> None:
    _, rough, packed, images = calibrated(name)
    once = rough.run(packed, images, isa=isa, threads=1, share=False)
    for share in (False, True):
        for threads in (1, 3):
            again = rough.run(packed, images, isa=isa, threads=threads, share=share)
            assert torch.equal(again, once)
    parts = [rough.run(packed, one[None], isa=isa) for one in images]
    assert torch.equal(torch.cat(parts, 1), once)


class Chain(nn.Module):
    """A byte convolution whose rounding can be followed by hand: what it reads is a copy of the
    image."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Conv2d(16, 16, 1, bias=False)
        self.conv = nn.Conv2d(16, 20, 3, padding=1)
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
    assert rough.byte_convolutions == 1
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
    with pytest.raises(ValueError, match="packed must be"):
        exact.measure_ranges(packed[:, :1], images)
    with pytest.raises(ValueError, match="images must be"):
        exact.measure_ranges(packed, images[:, :2])
    with pytest.raises(ValueError, match="isa must be"):
        exact.measure_ranges(packed, images, isa="mmx")
