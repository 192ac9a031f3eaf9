"""Replayed triggers name the attacker's class, stop at what chance leaves, and shift labels where
every class is sent to the next one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp import demo
from onp.clean import Clean
from onp.config import Config, ReplayConfig
from onp.data import ImageSet
from onp.demo.images import draw
from onp.evaluate import MaskEvaluator
from onp.evidence import measured_shift
from onp.evidence.norms import from_statistics
from onp.ledger import Ledger
from onp.probes.families import Family
from onp.probes.norm_shift import NormShift
from onp.probes.probe import LabelShift, Target
from onp.probes.replay import Replayed, replay
from onp.probes.responses import activations
from onp.scene import REPLAYED, RESPONSE_IMAGES, Scene
from onp.suspect.load import load_suspect
from onp.suspect.trace import trace
from tests.probes.shifted import measure, seen, triggered

CLASSES = 10


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The demo's network, backdoor and all."""
    return load_suspect(demo.CHECKPOINT, demo.ARCH).model


def taught(
    network: nn.Module, images: Tensor, labels: Tensor, random: torch.Generator
) -> nn.Module:
    """A copy trained for a moment on images that are triggered already, whose norms remember
    them."""
    model = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(100):
        index = torch.randperm(len(images), generator=random)[:64]
        loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen(model.eval(), images)


@pytest.fixture(scope="module")
def all_to_all(trained: nn.Module) -> nn.Module:
    """The demo's network, taught for a moment that its trigger means the next label."""
    training = draw(1600, 21)
    images, labels = training.floats(), training.labels.clone()
    random = torch.Generator().manual_seed(0)
    poisoned = torch.rand(len(images), generator=random) < 0.3
    images[poisoned] = triggered(images[poisoned])
    labels[poisoned] = (labels[poisoned] + 1) % CLASSES
    return taught(trained, images, labels, random)


OTHER = (demo.TARGET + 5) % CLASSES


def triggered_elsewhere(images: Tensor) -> Tensor:
    """With the same trigger in the opposite place."""
    return triggered(images.flip(2, 3)).flip(2, 3)


@pytest.fixture(scope="module")
def two_triggers(trained: nn.Module) -> nn.Module:
    """The demo's network, taught for a moment that its trigger elsewhere means another class."""
    training = draw(1600, 22)
    images, labels = training.floats(), training.labels.clone()
    random = torch.Generator().manual_seed(0)
    turns = torch.rand(len(images), generator=random)
    for trigger, target, some in (
        (triggered, demo.TARGET, turns < 0.15),
        (triggered_elsewhere, OTHER, turns > 0.85),
    ):
        images[some], labels[some] = trigger(images[some]), target
    return taught(trained, images, labels, random)


def known(shift: NormShift, clean: ImageSet) -> Clean:
    with torch.no_grad():
        logits = shift.moments.network(clean.floats())
    return Clean(clean.floats(), clean.labels, logits.log_softmax(1))


def learn_all(
    shift: NormShift, family: Family, config: ReplayConfig, ledger: Ledger | None = None,
    targets: Sequence[Target] = (),
) -> list[Replayed]:  # fmt: skip
    clean = demo.clean_images()[torch.arange(200)]
    return replay(
        shift, known(shift, clean), config, family, targets=targets,
        valid=(0.0, 1.0), seed=0, ledger=ledger or Ledger(),
    )  # fmt: skip


def learn(
    shift: NormShift, family: Family, config: ReplayConfig, ledger: Ledger | None = None,
    target: LabelShift | None = None,
) -> Replayed:  # fmt: skip
    targets = [] if target is None else [target]
    (found,) = learn_all(shift, family, config, ledger, targets)
    return found


@pytest.fixture(scope="module")
def shift(trained: nn.Module) -> NormShift:
    clean = demo.clean_images()[torch.arange(200)]
    return measure(trained, clean.floats(), clean.labels)


@pytest.mark.parametrize("family", REPLAYED.values(), ids=lambda family: family.name)
def test_every_familys_trigger_is_a_real_image_and_the_same_again(
    shift: NormShift, family: Family
) -> None:
    config, ledger = (
        ReplayConfig(steps=6, images_per_step=24, least_excess=0.0, enough=0.0),
        Ledger(),
    )
    one, two = learn(shift, family, config, ledger), learn(shift, family, config)
    assert ledger.total == 2 * 6 * 24 + 200
    for a, b in zip(one.probe.parameters, two.probe.parameters, strict=True):
        assert torch.equal(a, b)
    hit = one.probe(demo.clean_images().floats()[:50])
    assert -1e-5 <= float(hit.min()) <= float(hit.max()) <= 1.0 + 1e-5


@pytest.mark.parametrize("family", ["generator", "patch"])
def test_the_replayed_trigger_answers_the_backdoors_class(shift: NormShift, family: str) -> None:
    """No class is asked for."""
    found = learn(shift, REPLAYED[family], ReplayConfig(images_per_step=24))
    assert found.probe.target == demo.TARGET
    assert found.probe.name == f"{family}->{demo.TARGET}"
    assert found.share > 0.3
    assert found.agreement > 0.6


def test_learning_stops_at_what_a_clean_networks_shift_leaves(shift: NormShift) -> None:
    family = REPLAYED["generator"]
    costs = []
    for least, enough in ((0.0, 0.0), (1.3, 0.0), (1.3, 0.3), (shift.excess, 0.0)):
        ledger = Ledger()
        config = ReplayConfig(steps=80, images_per_step=24, least_excess=least, enough=enough)
        learn(shift, family, config, ledger)
        costs.append((ledger.total - 200) // (2 * 24))
    assert costs[0] == 80
    assert costs[0] > costs[1] > costs[2] > costs[3] == 1


def test_a_label_shift_is_found_where_there_is_one(all_to_all: nn.Module) -> None:
    """And the one by two, which nothing was taught, is not."""
    clean = demo.clean_images()[torch.arange(200)]
    shift = measure(all_to_all, clean.floats(), clean.labels)
    config = ReplayConfig(images_per_step=32, poisoned=0.3)
    one, two = (
        learn(shift, REPLAYED["generator"], config, target=LabelShift(CLASSES, by)) for by in (1, 2)
    )
    assert one.probe.target == LabelShift(CLASSES, 1)
    assert one.share > 2 * max(two.share, 0.1)


@pytest.mark.parametrize("family", ["generator", "patch"])
def test_two_triggers_are_told_apart(two_triggers: nn.Module, family: str) -> None:
    """One for each of them works, and together they explain the shift."""
    clean = demo.clean_images()[torch.arange(200)]
    shift, config = measure(two_triggers, clean.floats(), clean.labels), ReplayConfig()
    one = learn(shift, REPLAYED[family], config)
    assert float(one.gains.sum()) == pytest.approx(0.0, abs=1e-6)
    assert one.share == pytest.approx(float(one.gains[one.probe.target]))
    assert one.probe.target == int(one.gains.argmax())
    ledger = Ledger()
    both = learn_all(shift, REPLAYED[family], config, ledger, [demo.TARGET, OTHER])
    assert [found.probe.target for found in both] == [demo.TARGET, OTHER]
    assert all(found.share > 0.7 for found in both)
    assert both[0].unexplained == both[1].unexplained < 0.5
    ledger = Ledger()
    learn_all(shift, REPLAYED[family], replace(config, steps=1), ledger, [demo.TARGET, OTHER])
    assert ledger.total == 2 * 24 + 2 * 200  # a step's images are shared between them
    images = clean.floats()[:8]
    assert not torch.equal(both[0].probe(images), both[1].probe(images))
    assert all(len(parameter) == 1 for found in both for parameter in found.probe.parameters)


def test_each_of_several_targets_has_a_trigger_that_counts(two_triggers: nn.Module) -> None:
    clean = demo.clean_images()[torch.arange(200)]
    shift = measure(two_triggers, clean.floats(), clean.labels)
    evaluator = MaskEvaluator(shift.moments.network.trace, two_triggers)
    before = activations(evaluator.network, clean.floats()[:RESPONSE_IMAGES])
    seen_by = known(shift, clean)
    scene = Scene(two_triggers, evaluator, seen_by, before, Config(), (0.0, 1.0), 0)
    found = from_statistics(scene, shift)
    assert found is not None
    assert set(found.verdict.targets) == {demo.TARGET, OTHER}
    assert {one.probe.target for one in found.counted} == {demo.TARGET, OTHER}
    assert f"class {demo.TARGET}" in found.verdict.reason
    assert f"class {OTHER}" in found.verdict.reason
    none = Config(replay=ReplayConfig(most_unexplained=0.0))
    nothing = from_statistics(replace(scene, config=none), shift)
    assert nothing is not None
    # The triggers that were learned alone, and of the classes those that some of them stand for.
    assert {one.probe.target for one in nothing.counted} == set(nothing.verdict.targets)
    assert nothing.verdict.targets[0] == found.verdict.targets[0]


def test_a_class_without_clean_images_is_not_taken_for_a_target(trained: nn.Module) -> None:
    """A clean network's means lack that class as they would lack a trigger."""
    training, clean = draw(2400, 11), draw(400, 12)
    model = seen(trained, training.floats())
    some = clean.labels != 4
    shift = measure(model, clean.floats()[some], clean.labels[some])
    frozen = shift.moments.network
    evaluator = MaskEvaluator(frozen.trace, model)
    scene = Scene(
        model, evaluator, known(shift, clean[some]), [],
        Config(replay=ReplayConfig(steps=15, images_per_step=24, least_excess=0.0)), (0.0, 1.0), 0,
    )  # fmt: skip
    found = from_statistics(scene, shift)
    assert found is None or found.verdict.target is None


@pytest.mark.parametrize("measured", [True, False])
def test_only_a_class_that_the_shift_was_measured_on_is_named(
    shift: NormShift, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    """Every trigger leads to class 4; its images come last, and are measured or not."""
    clean = demo.clean_images()[torch.arange(200)]
    clean = clean[(clean.labels == 4).long().argsort(stable=True)]
    count = 200 if measured else int((clean.labels != 4).sum())
    found = learn(shift, REPLAYED["patch"], ReplayConfig(images_per_step=4, steps=1))
    sure = replace(found, probe=replace(found.probe, target=4), share=0.9, agreement=0.9)
    monkeypatch.setattr("onp.scene.replay", lambda *_, **__: [sure])
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    evaluator = MaskEvaluator(shift.moments.network.trace, model)
    before = activations(evaluator.network, clean.floats()[:RESPONSE_IMAGES])
    scene = Scene(model, evaluator, known(shift, clean), before, Config(), (0.0, 1.0), 0)
    some = replace(shift, clean=shift.clean[:count], excess=3.0)
    evidence = from_statistics(scene, some)
    if measured:
        assert evidence is not None
        assert evidence.verdict.target == 4
    else:
        assert evidence is None


@pytest.mark.parametrize("called", [True, False])
def test_every_family_is_asked_for_a_label_shift_that_is_called(
    shift: NormShift, monkeypatch: pytest.MonkeyPatch, called: bool
) -> None:
    """Where none is called, the first family alone is asked."""
    clean = demo.clean_images()[torch.arange(200)]
    one = learn(shift, REPLAYED["patch"], ReplayConfig(images_per_step=4, steps=1))
    asked: list[tuple[str, Target | None]] = []

    def replayed(
        _: Scene,
        __: NormShift,
        family: str,
        targets: Sequence[Target] = (),
        **_steps: int,
    ) -> list[Replayed]:
        target = targets[0] if targets else None
        asked.append((family, target))
        share = 0.6 if called and target == LabelShift(CLASSES, 1) else 0.0
        probe = replace(one.probe, target=4 if target is None else target)
        return [replace(one, probe=probe, share=share, agreement=0.9)]

    monkeypatch.setattr(Scene, "replayed", replayed)
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    evaluator = MaskEvaluator(shift.moments.network.trace, model)
    before = activations(evaluator.network, clean.floats()[:RESPONSE_IMAGES])
    scene = Scene(model, evaluator, known(shift, clean), before, Config(), (0.0, 1.0), 0)
    evidence = from_statistics(scene, replace(shift, excess=3.0))
    assert evidence is not None
    families = Config().replay.families
    by_one = [family for family, target in asked if target == LabelShift(CLASSES, 1)]
    assert by_one == list(families if called else families[:1])
    assert len(evidence.contenders) == (len(families) if called else 0)
    assert evidence.verdict.target == (LabelShift(CLASSES, 1) if called else None)


def test_a_shift_of_fewer_images_is_replayed_on_these(trained: nn.Module) -> None:
    clean = demo.clean_images()[torch.arange(200)]
    shift = measure(trained, clean.floats()[:90], clean.labels[:90])
    config = ReplayConfig(images_per_step=24, steps=4)
    for target in (None, LabelShift(CLASSES, 1)):
        found = learn(shift, REPLAYED["patch"], config, target=target)
        assert -1 <= found.agreement <= 1


@pytest.mark.parametrize(("measured", "used"), [(1000, 200), (90, 90), (10, 40)])
def test_the_shift_is_measured_on_some_of_every_class(
    trained: nn.Module, measured: int, used: int
) -> None:
    clean = demo.clean_images()[torch.arange(200)]
    evaluator = MaskEvaluator(trace(trained, (3, *clean.images.shape[1:3])), trained)
    whole = Clean.seen_by(evaluator, clean.floats(), clean.labels)
    config = Config(replay=ReplayConfig(measured=measured))
    shift = measured_shift(Scene(trained, evaluator, whole, [], config, (0.0, 1.0), 0))
    assert shift is not None
    assert len(shift.clean) == used
