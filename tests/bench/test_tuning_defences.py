"""The tuning defences do what their papers say, on copies, and count what they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.defences import i_bau, nad, nc
from bench.defences.api import Info, NotApplicable
from bench.defences.finetuning import finetune, schedule_text
from bench.defences.ft import fine_tuning
from bench.defences.ft_sam import perturbation, sharpness_aware_step, sharpness_aware_tuning
from bench.zoo.architectures import ARCHITECTURES
from onp import demo
from onp.data import ImageSet, Normalize
from onp.demo.images import CLASSES, draw
from onp.ledger import Ledger
from onp.metrics import predict, score
from onp.suspect.architectures.convnext import of_width as convnext_of_width
from onp.suspect.architectures.preactresnet import of_width
from onp.suspect.architectures.vit import of_width as vit_of_width
from onp.suspect.load import load_suspect
from onp.triggers import load_trigger

IMAGES = 30
Run = Callable[[nn.Module, ImageSet, Ledger], tuple[nn.Module, Info]]

SHORT: dict[str, tuple[Run, int]] = {
    "ft": (
        lambda m, c, ledger: fine_tuning(m, c, seed=0, ledger=ledger, epochs=2),
        2 * 3 * IMAGES,
    ),
    "nad": (
        lambda m, c, ledger: nad.attention_distillation(
            m, c, seed=0, ledger=ledger, teacher_epochs=1, epochs=2
        ),
        3 * IMAGES + 2 * (3 + 1) * IMAGES,
    ),
    "ft-sam": (
        lambda m, c, ledger: sharpness_aware_tuning(m, c, seed=0, ledger=ledger, epochs=1),
        2 * 3 * IMAGES,
    ),
    "i-bau": (
        lambda m, c, ledger: i_bau.implicit_unlearning(
            m, c, seed=0, ledger=ledger, rounds=1, batch=20
        ),
        (1 + 2) * IMAGES + (3 + (1 + 2) + 4 * 2 + 4) * IMAGES,
    ),
    "nc": (
        lambda m, c, ledger: nc.neural_cleanse(
            m, c, seed=0, ledger=ledger, steps=2, search_forwards=2 * 2 * 10 * 5
        ),
        1 + 2 * 2 * 10 * 5,
    ),
}
"""Every defence with a short schedule, and the image-forwards of that."""


def suspect(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    network = of_width(width, len(CLASSES), (1, 1, 1, 1))
    return nn.Sequential(Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), network).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", SHORT)
def test_the_given_network_is_not_changed_and_forwards_are_counted(name: str) -> None:
    run, forwards = SHORT[name]
    model, clean, ledger = suspect(), draw(IMAGES, 1), Ledger()
    before, draws = state(model), torch.get_rng_state()
    repaired, info = run(model, clean, ledger)
    assert same(before, state(model))
    assert not model.training
    assert not repaired.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(before, state(repaired)) == (name == "nc")  # nothing is flagged in two steps
    assert ledger.total == forwards
    assert " of " in info.schedule
    assert torch.equal(draws, torch.get_rng_state())
    again, _ = run(model, clean, Ledger())
    assert same(state(repaired), state(again))


@pytest.mark.parametrize(("name", "price"), [("ft", 3), ("ft-sam", 3)])
def test_the_count_is_that_of_the_images_that_ran(name: str, price: int) -> None:
    seen = 0

    def hear(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    model, ledger = suspect(), Ledger()
    model.register_forward_pre_hook(hear)  # goes along with copies
    SHORT[name][0](model, draw(IMAGES, 1), ledger)
    assert ledger.total == price * seen


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("build", [vit_of_width, convnext_of_width])
def test_other_architectures_are_treated_too(name: str, build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = build(8, len(CLASSES), 2 if build is vit_of_width else (1, 1, 1)).eval()
    ledger = Ledger()
    repaired, _ = SHORT[name][0](model, draw(IMAGES, 1), ledger)
    assert ledger.total == SHORT[name][1]
    assert all(bool(weight.isfinite().all()) for weight in repaired.parameters())


# ---- fine-tuning --------------------------------------------------------------------------------


def test_fine_tuning_restores_a_damaged_classifier() -> None:
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    nn.init.zeros_(model.get_submodule("linear").weight)  # type: ignore[arg-type]
    test = draw(100, 2)
    assert score(model, test)["clean_accuracy"] <= 0.2
    tuned = finetune(
        model, draw(200, 1), epochs=2, seed=0, ledger=Ledger(), learning_rate=0.05, batch=25
    )
    assert score(tuned, test)["clean_accuracy"] > 0.7


def test_the_schedule_tells_updates_beside_epochs() -> None:
    assert schedule_text(40, 100, draw(500, 1)) == (
        "40 of 100 epochs, 160 updates in batches of up to 128 "
        "(on 5% of CIFAR-10: 1000 in batches of 256)"
    )


def test_no_batch_is_too_small_for_batch_statistics() -> None:
    sizes = []

    def step(_model: nn.Module, optimizer: Any, images: Tensor, _labels: Tensor) -> int:
        optimizer.step()
        sizes.append(len(images))
        return 0

    finetune(suspect(), draw(17, 1), epochs=1, seed=0, ledger=Ledger(), batch=8, step=step)
    assert sizes == [6, 6, 5]


# ---- NAD ----------------------------------------------------------------------------------------


def test_attention_is_the_normalised_sum_of_squares_over_the_channels() -> None:
    features = torch.randn(2, 5, 3, 4)
    got = nad.attention_map(features)
    for image in range(2):
        energy = [
            sum(float(features[image, c, y, x]) ** 2 for c in range(5))
            for y in range(3)
            for x in range(4)
        ]
        norm = sum(e * e for e in energy) ** 0.5
        torch.testing.assert_close(got[image], torch.tensor(energy) / norm)
    tokens = torch.randn(2, 7, 5)
    expected = F.normalize(tokens.square().sum(2), dim=1)
    torch.testing.assert_close(nad.attention_map(tokens), expected)


def test_distance_weighs_the_last_maps() -> None:
    one, zero = [torch.ones(2, 4)] * 3, [torch.zeros(2, 4)] * 3
    assert float(nad.distance(one, zero)) == sum(nad.BETAS)
    assert float(nad.distance(one[:1], zero[:1])) == nad.BETAS[-1]


ENDS: dict[str, tuple[float, dict[str, int]]] = {
    "preactresnet18": (4, {"layer2": 16, "layer3": 8, "layer4": 4}),
    "resnet20": (4, {"layer1": 32, "layer2": 16, "layer3": 8}),
    "vgg16_bn": (4, {"features.22": 8, "features.32": 4, "features.42": 2}),  # ReLUs
    "mobilenetv2": (0.25, {"layers.5": 16, "layers.12": 8, "layers": 4}),
    "densenet": (4, {"features.denseblock1": 32, "features.denseblock2": 16,
                     "features.denseblock3": 8}),
    "convnext": (8, {"stages.0": 16, "stages.1": 8, "stages.2": 4}),
}  # fmt: skip
"""Of an architecture a width, and the modules that end its last three resolutions, with those."""


@pytest.mark.parametrize("arch", ENDS)
def test_maps_come_from_the_blocks_that_end_the_last_three_resolutions(arch: str) -> None:
    width, ends = ENDS[arch]
    torch.manual_seed(0)
    network = ARCHITECTURES[arch](width, len(CLASSES)).eval()
    model = nn.Sequential(Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), network)
    kept: dict[str, Tensor] = {}
    for name in ends:
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: kept.update({name: output})
        )
    with torch.no_grad(), nad.listening(model) as heard:
        model(draw(2, 1).floats())
    attention = heard.attention()
    assert [part.shape[1] for part in attention] == [size * size for size in ends.values()]
    for part, name in zip(attention, ends, strict=True):
        assert torch.equal(part, nad.attention_map(kept[name]))
    assert not any(
        module._forward_hooks for name, module in network.named_modules() if name not in ends
    )


def test_a_stage_that_ends_in_an_activation_in_place_is_a_block() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    model = nn.Sequential(stage, nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = draw(2, 1).floats()
    with torch.no_grad(), nad.listening(model) as heard:
        model(images)
    with torch.no_grad():
        assert torch.equal(heard.attention()[0], nad.attention_map(stage(images)))


class Tokens(nn.Module):
    """A network of tokens whose blocks hold longer stacks than it has blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(*[nn.Linear(8, 8)] * 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_maps_of_a_network_of_tokens_come_from_its_last_blocks() -> None:
    model, kept = Tokens(), []
    for block in model.blocks[1:]:
        block.register_forward_hook(lambda _m, _i, output: kept.append(output))
    with torch.no_grad(), nad.listening(model) as heard:
        model(torch.rand(2, 3, 32, 32))
    for part, output in zip(heard.attention(), kept, strict=True):
        assert torch.equal(part, nad.attention_map(output))


def test_a_network_without_maps_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(NotApplicable, match="feature maps"):
        nad.attention_distillation(model, draw(4, 1), seed=0, ledger=Ledger(), teacher_epochs=0)


def test_distillation_draws_the_student_to_the_teacher() -> None:
    teacher, clean = suspect(8), draw(20, 1)
    student = suspect(8)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    images = clean.floats()

    def apart() -> float:
        with torch.no_grad():
            with nad.listening(teacher) as heard:
                teacher(images)
            taught = heard.attention()
            with nad.listening(student) as heard:
                student(images)
            return float(nad.distance(heard.attention(), taught))

    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    step, before = nad.distillation_step(teacher), apart()
    for _ in range(5):
        assert step(student, optimizer, images, clean.labels) == 4 * len(clean)
    assert apart() < 0.7 * before


# ---- FT-SAM -------------------------------------------------------------------------------------


def test_the_perturbation_has_the_stated_norm_and_direction() -> None:
    weights = [torch.randn(4, 3), torch.randn(5)]
    gradients = [torch.randn(4, 3), torch.randn(5)]
    moves = perturbation(weights, gradients, rho=2.0)
    relative = torch.cat([(e / w).flatten() for e, w in zip(moves, weights, strict=True)])
    assert float(relative.norm()) == pytest.approx(2.0, rel=1e-5)
    scaled = torch.cat([(w.abs() * g).flatten() for w, g in zip(weights, gradients, strict=True)])
    signs = torch.cat([w.sign().flatten() for w in weights])
    torch.testing.assert_close(relative * signs, 2 * scaled / scaled.norm())


def test_a_step_descends_with_the_gradient_found_at_the_moved_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3)).train()
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 3
    weights = [weight.detach().clone() for weight in model.parameters()]
    running = model[2].running_mean.clone()

    def gradients(at: list[Tensor]) -> list[Tensor]:
        named = dict(zip((name for name, _ in model.named_parameters()), at, strict=True))
        at = [weight.requires_grad_(True) for weight in at]
        logits = torch.func.functional_call(model, named, images)
        return list(torch.autograd.grad(F.cross_entropy(logits, labels, label_smoothing=0.1), at))

    slopes = gradients([weight.clone() for weight in weights])
    moves = perturbation(weights, slopes, 0.5)
    uphill = gradients([w + e for w, e in zip(weights, moves, strict=True)])
    model[2].running_mean.copy_(running)
    expected_mean = 0.9 * running + 0.1 * F.linear(images.flatten(1), *weights[:2]).mean(0)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert sharpness_aware_step(0.5)(model, optimizer, images, labels) == 6 * len(images)
    for weight, before, gradient in zip(model.parameters(), weights, uphill, strict=True):
        torch.testing.assert_close(weight.detach(), before - 0.1 * gradient)
    torch.testing.assert_close(model[2].running_mean, expected_mean)  # recorded once
    assert model[2].track_running_stats


# ---- I-BAU --------------------------------------------------------------------------------------


class Quadratic:
    """inner = d'Ad/2 - d'Bw, so d*(w) = A^-1 B w; outer = |d - t|^2/2 + c |w|^2/2."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        root = torch.randn(4, 4, generator=random, dtype=torch.float64)
        self.a = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
        self.b = torch.randn(4, 3, generator=random, dtype=torch.float64)
        self.t = torch.randn(4, generator=random, dtype=torch.float64)
        self.w = torch.randn(3, generator=random, dtype=torch.float64).requires_grad_(True)
        self.delta = torch.linalg.solve(self.a, self.b @ self.w.detach())

    def inner(self, d: Tensor) -> Tensor:
        return d @ self.a @ d / 2 - d @ self.b @ self.w

    def outer(self, d: Tensor) -> Tensor:
        return (d - self.t).square().sum() / 2 + 0.3 * self.w.square().sum() / 2


def test_the_hypergradient_converges_to_the_implicit_derivative() -> None:
    toy = Quadratic()
    (got,) = i_bau.hypergradient(toy.outer, toy.inner, toy.delta, [toy.w], steps=400, rate=0.1)
    adjoint = torch.linalg.solve(toy.a, toy.delta - toy.t)
    torch.testing.assert_close(got, 0.3 * toy.w.detach() + toy.b.T @ adjoint)


def test_few_steps_give_the_truncated_series() -> None:
    toy, rate, steps = Quadratic(), 0.1, 5
    (got,) = i_bau.hypergradient(toy.outer, toy.inner, toy.delta, [toy.w], steps=steps, rate=rate)
    jacobian = torch.eye(4, dtype=torch.float64) - rate * toy.a
    series = sum(torch.linalg.matrix_power(jacobian, power) for power in range(steps))
    expected = 0.3 * toy.w.detach() + rate * toy.b.T @ (series @ (toy.delta - toy.t))
    torch.testing.assert_close(got, expected)


def test_a_small_batch_has_one_perturbed_image_and_the_schedule_says_so() -> None:
    random = torch.Generator().manual_seed(0)
    places = [i_bau.stamped_places(count, random) for count in (10, 50, 256)]
    assert [len(place) for place in places] == [1, 1, 3]
    _, info = i_bau.implicit_unlearning(
        suspect(), draw(30, 1), seed=0, ledger=Ledger(), rounds=1, batch=20
    )
    assert info.settings["perturbed_share"] == round(2 / 30, 4)
    assert "2 updates in batches of up to 20 with 6.7% of the images perturbed" in info.schedule


def test_the_universal_perturbation_turns_answers() -> None:
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    images, ledger = draw(60, 1).floats(), Ledger()
    random = torch.Generator().manual_seed(0)
    delta = i_bau.universal_perturbation(model, images, 20, random, ledger)
    assert delta.shape == (1, 3, 32, 32)
    before, after = (predict(model, x) for x in (images, images + delta))
    assert float((before != after).float().mean()) > 0.2
    assert ledger.total == 3 * len(images)


# ---- Neural Cleanse -----------------------------------------------------------------------------


def test_anomalies_are_small_outliers_smallest_first() -> None:
    sizes = torch.tensor([100.0, 104.0, 96.0, 30.0, 101.0, 99.0, 10.0, 300.0, 98.0])
    assert nc.flagged_classes(sizes) == [6, 3]
    deviations = (sizes - 99).abs()  # 99 is the median, 3 the median deviation
    torch.testing.assert_close(nc.anomaly_indices(sizes).abs(), deviations / (1.4826 * 3))
    assert nc.flagged_classes(torch.full((10,), 50.0)) == []
    unfound = torch.full((9,), torch.nan)
    assert nc.flagged_classes(torch.cat([sizes, unfound])) == [6, 3]  # they count for nothing
    assert nc.flagged_classes(torch.cat([sizes, unfound, unfound[:1]])) == []  # too few are found
    assert nc.flagged_classes(unfound) == []


def test_the_demos_target_is_found_and_its_backdoor_unlearned() -> None:
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    trigger, test = load_trigger(str(demo.TRIGGER)), draw(100, 2)
    repaired, info = nc.neural_cleanse(
        model,
        demo.clean_images(),
        seed=0,
        ledger=Ledger(),
        steps=150,
        search_forwards=24_000,
        anomaly=1.4,  # a short search leaves the other classes' sizes scattered
        epochs=2,
    )
    assert info.settings["flagged"] == [demo.TARGET]
    assert score(model, test, trigger, demo.TARGET)["attack_success_rate"] > 0.95
    after = score(repaired, test, trigger, demo.TARGET)
    assert after["attack_success_rate"] < 0.5
    assert after["clean_accuracy"] > 0.8


def test_stamped_images_keep_their_labels_and_share_the_patches() -> None:
    patches = nc.Patches(
        masks=torch.ones(10, 1, 32, 32),
        patterns=torch.arange(10).view(10, 1, 1, 1).expand(10, 3, 32, 32) / 10.0,
        sizes=torch.full((10,), torch.nan),
    )
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    images, labels = torch.full((40, 3, 32, 32), 0.95), torch.arange(40) % 10
    step = nc.unlearning_step(patches, [7, 2], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    assert step(model, optimizer, images, labels) == 3 * 40
    values = seen[0][:, 0, 0, 0]
    counts = [int(torch.isclose(values, torch.tensor(v)).sum()) for v in (0.7, 0.2, 0.95)]
    assert counts == [4, 4, 32]
