"""Trigger families keep their bounds and the pixel range, and synthesis finds a planted trigger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onp.ledger import Ledger
from onp.probes import synthesis
from onp.probes.families import Family
from onp.probes.gradients import Loss, pixel_gradients
from onp.probes.low_frequency import dct_basis
from onp.probes.probe import LabelShift
from onp.probes.roaming import Roaming
from onp.probes.square import Square
from onp.probes.synthesis import FAMILIES, synthesise
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace

ALL = (*FAMILIES, Square(1, 2), Roaming())


@pytest.mark.parametrize("valid", [(0.0, 1.0), (-1.0, 1.0)], ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 48, 20)], ids=str)
@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_triggered_images_are_real_images(
    family: Family, shape: tuple[int, int, int], valid: tuple[float, float]
) -> None:
    random = torch.Generator().manual_seed(0)
    parameters = family.start(2, shape, random)
    for parameter in parameters:
        parameter += torch.randn(parameter.shape, generator=random) * 3
    family.project(parameters, valid)
    images = valid[0] + (valid[1] - valid[0]) * torch.rand(2, 5, *shape, generator=random)
    triggered = family.apply(parameters, images, valid)
    assert triggered.shape == images.shape
    assert float(triggered.min()) >= valid[0] - 1e-5
    assert float(triggered.max()) <= valid[1] + 1e-5
    assert not torch.equal(triggered, images)
    size = family.size(parameters, valid)
    assert size.shape == family.penalty(parameters).shape == (2,)
    if family.name != "patch":  # a patch has a price instead of a bound
        assert float(size.max()) <= 1 + 1e-4


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_every_parameter_gets_a_gradient(family: Family) -> None:
    parameters = family.start(1, (3, 16, 16), torch.Generator().manual_seed(0))
    for parameter in parameters:
        parameter.requires_grad_(True)
    images = torch.rand(1, 2, 3, 16, 16) * 0.8 + 0.1
    family.apply(parameters, images, (0.0, 1.0)).square().sum().backward()
    for parameter in parameters:
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0


def test_the_dct_basis_is_orthonormal_at_its_reference_size() -> None:
    basis = dct_basis(16, 32)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), rtol=0, atol=1e-5)


def test_synthesis_finds_what_a_network_looks_for() -> None:
    """A linear network that answers class 1 on a bright corner: all small triggers exist for it."""
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 2)
    model = nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), linear).eval()
    with torch.no_grad():
        linear.weight.normal_(0, 0.05)
        linear.weight[1, 0] = 30.0
        conv.weight[0] = 0.1
        linear.bias.copy_(torch.tensor([7.0, 0.0]))
    images = torch.rand(64, 3, 16, 16) * 0.2
    labels = torch.zeros(64, dtype=torch.int64)
    network = FrozenNetwork(trace(model, (3, 16, 16)), model)
    ledger = Ledger()
    arguments = {"steps": 40, "draw": 16, "valid": (0.0, 1.0), "seed": 0, "ledger": ledger}
    probes = synthesise(network, images, labels, [1], **arguments)  # type: ignore[arg-type]
    assert [probe.name for probe in probes] == [f"{family.name}->1" for family in FAMILIES]
    assert ledger.total == 2 * 40 * 16 * len(FAMILIES)
    with torch.no_grad():
        assert (network(images).argmax(1) == 0).all()
        success = {
            p.family.name: float((network(p(images)).argmax(1) == 1).float().mean()) for p in probes
        }
    assert success["patch"] > 0.9
    assert success["additive"] > 0.9
    again = synthesise(network, images, labels, [1], **arguments)  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b)
        for one, two in zip(probes, again, strict=True)
        for a, b in zip(one.parameters, two.parameters, strict=True)
    )


def test_targets_may_be_classes_and_shifts_of_labels() -> None:
    """Each trigger is learned and judged by its own answers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images, labels = torch.rand(9, 3, 8, 8), torch.arange(9) % 3
    network = FrozenNetwork(trace(model, (3, 8, 8)), model)
    asked: list[list[int]] = []

    def asks(
        frozen: FrozenNetwork, pixels: Tensor, answers: Tensor, loss: Loss, gates: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        asked.append(answers.tolist())
        return pixel_gradients(frozen, pixels, answers, loss, gates)

    shift = LabelShift(3, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "pixel_gradients", asks)
        probes = synthesis.synthesise(
            network, images, labels, [1, shift], families=FAMILIES[:2], steps=1, draw=4,
            valid=(0.0, 1.0), seed=0, ledger=Ledger(),
        )  # fmt: skip
    assert [probe.target for probe in probes] == [1, shift, 1, shift]
    draw = torch.Generator().manual_seed(0)
    for family in FAMILIES[:2]:
        family.start(2, (3, 8, 8), draw)
    others = (labels != 1).nonzero().squeeze(1)
    others[torch.randint(len(others), (4,), generator=draw)]
    shifted = (labels[torch.randint(9, (4,), generator=draw)] + 2) % 3
    assert asked == [[1, 1, 1, 1, *shifted.tolist()] * 2]
