"""Running means that saw triggered images show the trigger's effect; crops, mirrors and class
shares do not count."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from onp import demo
from onp.config import Config, ReplayConfig
from onp.demo.images import draw
from onp.evaluate import MaskEvaluator
from onp.evidence import Scene, from_statistics
from onp.ledger import Ledger
from onp.probes.norm_shift import NormShift, by_site, norm_shift, rms, shifted_at_random
from onp.probes.replay import replay
from onp.suspect.load import load_suspect
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace
from onp.triggers import load_trigger
from tests.networks import network


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The demo's network, backdoor and all; most tests give it other running statistics."""
    return load_suspect(demo.CHECKPOINT, demo.ARCH).model


def triggered(images: Tensor) -> Tensor:
    """With the trigger that the demo's network knows."""
    return load_trigger(str(demo.TRIGGER))(images)


def seen(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with running statistics taken anew over images, in one batch."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> NormShift:
    frozen = FrozenNetwork(trace(model, (3, 32, 32)), model)
    ledger = Ledger()
    shift = norm_shift(frozen, model, images, labels, valid=(0.0, 1.0), seed=0, ledger=ledger)
    assert shift is not None
    assert ledger.total == 4 * len(images)
    return shift


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
        effect = shift.means(triggered(clean.floats()))[1].mean(0) - shift.clean.mean(0)
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
    traced = shift.means.network.trace
    values = by_site(shift, traced)
    assert values.shape == (traced.sites,)
    with_norm = [layer for layer in traced.layers if layer.norm is not None]
    assert with_norm
    for layer in with_norm:
        assert layer.norm is not None
        expected = shift.residual[shift.means.at[layer.norm]]
        assert torch.equal(values[layer.sites], expected)


def test_a_network_without_batch_norms_has_no_shift() -> None:
    model = network("vgg11", size=(32, 32))
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    frozen = FrozenNetwork(trace(model, (3, 32, 32)), model)
    shift = norm_shift(frozen, model, images, labels, valid=(0.0, 1.0), seed=0, ledger=Ledger())
    assert shift is None


def test_dead_channels_and_missing_classes_stay_finite(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight[3] = 0
    clean = draw(60, 12)
    some = clean.labels != 2
    shift = measure(model, clean.floats()[some], clean.labels[some])
    assert bool(shift.residual.isfinite().all())
    assert not bool(shift.means.live[3])
    assert float(shift.residual[3].abs()) < 1e-6


def test_the_replayed_trigger_answers_the_backdoors_class(trained: nn.Module) -> None:
    """No class is asked for. The same seed gives the same trigger, inside the valid range."""
    clean = demo.clean_images()[torch.arange(200)]
    images, labels = clean.floats(), clean.labels
    shift = measure(trained, images, labels)
    config, ledger = ReplayConfig(images_per_step=24), Ledger()
    arguments = {"steps": 25, "valid": (0.0, 1.0), "seed": 0}
    free = replay(shift, images, labels, config, ledger=ledger, **arguments)  # type: ignore[arg-type]
    assert free.probe.target == demo.TARGET
    assert free.share > 0.3
    assert free.agreement > 0.6
    assert ledger.total == 2 * 25 * 24 + 2 * 200
    again = replay(shift, images, labels, config, ledger=Ledger(), **arguments)  # type: ignore[arg-type]
    for a, b in zip(free.probe.parameters, again.probe.parameters, strict=True):
        assert torch.equal(a, b)
    hit = free.probe(images)
    assert 0.0 <= float(hit.min()) <= float(hit.max()) <= 1.0


def test_renewing_reaches_the_class_through_closed_gates(trained: nn.Module) -> None:
    clean = demo.clean_images()[torch.arange(150)]
    images, labels = clean.floats(), clean.labels
    shift = measure(trained, images, labels)
    network = shift.means.network
    config, ledger = ReplayConfig(images_per_step=16), Ledger()
    arguments = {"steps": 20, "valid": (0.0, 1.0), "seed": 0}
    free = replay(shift, images, labels, config, ledger=Ledger(), **arguments)  # type: ignore[arg-type]
    response = by_site(shift, network.trace).abs()
    gates = (response < response.sort().values[-5]).float()  # the five that the shift shows most
    renewed = replay(
        shift,
        images,
        labels,
        config,
        ledger=ledger,
        against=(free.probe, gates),
        **arguments,  # type: ignore[arg-type]
    )
    assert ledger.total == 4 * 20 * 16 + 2 * 150
    assert renewed.probe.name == f"replay+->{free.probe.target}"
    with torch.no_grad():
        before, after = (
            float(network(p(images), gates).softmax(1)[:, free.probe.target].mean())
            for p in (free.probe, renewed.probe)
        )
    assert after > before


def test_a_class_without_clean_images_is_not_taken_for_a_target(trained: nn.Module) -> None:
    """A clean network's means lack that class as they would lack a trigger."""
    training, clean = draw(2400, 11), draw(400, 12)
    model = seen(trained, training.floats())
    some = clean.labels != 4
    shift = measure(model, clean.floats()[some], clean.labels[some])
    frozen = shift.means.network
    evaluator = MaskEvaluator(frozen.trace, model)
    scene = Scene(
        model, evaluator, clean.floats()[some], clean.labels[some], [],
        Config(replay=ReplayConfig(steps=15, images_per_step=24, least_excess=0.0)), (0.0, 1.0), 0,
    )  # fmt: skip
    found = from_statistics(scene, shift)
    assert found is None or found.verdict.target is None


@pytest.mark.parametrize("count", [20, 40, 60])
def test_few_images_are_no_evidence(trained: nn.Module, count: int) -> None:
    training, clean = draw(2400, 11), draw(count, 12)
    shift = measure(seen(trained, training.floats()), clean.floats(), clean.labels)
    assert shift.excess < 1.5
