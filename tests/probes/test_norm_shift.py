"""Running means that saw triggered images show the trigger's effect; crops, mirrors and class
shares do not count."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from onp import demo
from onp.demo.images import draw
from onp.ledger import Ledger
from onp.probes.norm_shift import by_site, norm_shift, rms, shifted_at_random
from onp.suspect.load import load_suspect
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace
from tests.networks import network
from tests.probes.shifted import measure, seen, triggered


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The demo's network, backdoor and all; most tests give it other running statistics."""
    return load_suspect(demo.CHECKPOINT, demo.ARCH).model


def test_poisoned_statistics_stand_out_and_point_where_the_trigger_does(trained: nn.Module) -> None:
    training, clean = draw(2400, 11), draw(400, 12)
    pixels = training.floats()
    poisoned = pixels.clone()
    poisoned[::10] = triggered(pixels[::10])
    own = measure(seen(trained, pixels), clean.floats(), clean.labels)
    shift = measure(seen(trained, poisoned), clean.floats(), clean.labels)
    assert own.excess < 1.3
    assert shift.excess > 1.5 * own.excess
    with torch.no_grad():
        effect = shift.moments(triggered(clean.floats()))[1].mean(0) - shift.clean.mean(0)
    expected = shift.explained(effect)
    assert float(torch.cosine_similarity(shift.residual, expected, dim=0)) > 0.8


def test_crops_mirrors_and_class_shares_are_taken_out(trained: nn.Module) -> None:
    training, clean = draw(2400, 11), draw(400, 12)
    keep = (training.labels > 2) | (torch.arange(2400) % 4 == 0)  # three classes are rare
    pixels = training.floats()[keep].flip(3)
    pixels = shifted_at_random(pixels, 0.0, 8, torch.Generator().manual_seed(1))
    shift = measure(seen(trained, pixels), clean.floats(), clean.labels)
    raw = rms(shift.clean.mean(0) / shift.noise)
    assert raw > 3  # it is there, and
    assert rms(shift.residual) < 0.25 * raw  # is explained
    assert shift.excess < 1.5


def test_sites_get_the_shift_of_their_own_norm(trained: nn.Module) -> None:
    clean = draw(60, 12)
    shift = measure(trained, clean.floats(), clean.labels)
    traced = shift.moments.network.trace
    values = by_site(shift, traced)
    assert values.shape == (traced.sites,)
    with_norm = [layer for layer in traced.layers if layer.norm is not None]
    assert with_norm
    for layer in with_norm:
        assert layer.norm is not None
        first, second = (part[shift.moments.at[layer.norm]] for part in shift.residual.chunk(2))
        expected = torch.stack([first, second]).norm(dim=0)
        assert torch.equal(values[layer.sites], expected)


def test_a_network_without_batch_norms_has_no_shift() -> None:
    model = network("vgg11", size=(32, 32))
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    frozen = FrozenNetwork(trace(model, (3, 32, 32)), model)
    shift = norm_shift(frozen, model, images, labels, valid=(0.0, 1.0), seed=0, ledger=Ledger())
    assert shift is None


def test_dead_channels_and_missing_classes_stay_finite(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    conv = model.get_submodule("layer1.0.conv1")
    norm = model.get_submodule("layer1.0.bn2")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight[3] = 0
        conv.weight[5] = 0  # what it makes is constant, and the norm knows
        norm.running_mean[5] = norm.running_var[5] = 0
    clean = draw(60, 12)
    some = clean.labels != 2
    shift = measure(model, clean.floats()[some], clean.labels[some])
    assert bool(shift.residual.isfinite().all())
    count, first = len(shift.moments.live), 16  # of the second norm
    assert not bool(shift.moments.live[first + 3])
    for moment in (first + 3, first + 5, count + first + 3, count + first + 5):
        assert float(shift.residual[moment].abs()) < 1e-3
    assert shift.excess < 2 * measure(trained, clean.floats()[some], clean.labels[some]).excess


@pytest.mark.parametrize("count", [20, 40, 60])
def test_few_images_are_no_evidence(trained: nn.Module, count: int) -> None:
    training, clean = draw(2400, 11), draw(count, 12)
    shift = measure(seen(trained, training.floats()), clean.floats(), clean.labels)
    assert shift.excess < 1.5
