"""The attacks' triggers against their formulas, and how they poison training images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.attacks import ATTACKS, Attack, Knowledge, poison
from bench.zoo.attacks.adaptive_blend import AdaptiveBlend
from bench.zoo.attacks.adaptive_patch import AdaptivePatch
from bench.zoo.attacks.anywhere import Anywhere
from bench.zoo.attacks.base import drawn_by_pixels
from bench.zoo.attacks.bpp import Bpp, dithered
from bench.zoo.attacks.filter import Filter
from bench.zoo.attacks.ftrojan import FTrojan
from bench.zoo.attacks.input_aware import InputAware
from bench.zoo.attacks.lc import LabelConsistent, hard_to_recognise
from bench.zoo.attacks.lf import LowFrequency
from bench.zoo.attacks.reflection import Reflection
from bench.zoo.attacks.several import Several
from bench.zoo.attacks.sig import Sig
from bench.zoo.attacks.ssba import Ssba
from bench.zoo.attacks.tact import TaCT
from bench.zoo.attacks.trojannn import TrojanNN, best_connected, penultimate
from bench.zoo.attacks.wanet import WaNet
from bench.zoo.training import TrainingConfig, train

CLASSES = 4
HALF_A_LEVEL = 0.5 / 255 + 1e-6
NAMES = sorted(ATTACKS)
SEEDED = [
    "adaptive-blend", "adaptive-patch", "blended", "input-aware", "lf", "patch-and-blend",
    "reflection", "ssba", "trojannn", "two-ways", "wanet",
]  # fmt: skip
FEW_STEPS: dict[str, dict[str, int]] = {
    "input-aware": {"mask_steps": 2, "mask_batch": 4},
    "ssba": {"steps": 2, "batch_size": 4},
    "trojannn": {"steps": 3, "backgrounds": 2},
    "lc": {"steps": 2},
}


def _pixels(count: int, size: int, seed: int = 0) -> Tensor:
    """uint8 [N, H, W, 3], smooth so that warps and dithering have something to do."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=random)
    smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _floats(count: int, size: int = 32, seed: int = 0) -> Tensor:
    return _pixels(count, size, seed).permute(0, 3, 1, 2).float() / 255


def _surrogate() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, CLASSES),
        )  # fmt: skip


def _prepared(name: str, size: int = 32, seed: int = 0, target: int = 1) -> Attack:
    """The attack after a preparation of a few steps."""
    attack = ATTACKS[name](target=target, classes=CLASSES, size=size, seed=seed)
    for setting, value in FEW_STEPS.get(name, {}).items():
        setattr(attack, setting, value)
    labels = torch.arange(12) % CLASSES
    attack.prepare(Knowledge(_pixels(12, size, 7), labels, _surrogate(), lambda line: None))
    return attack


def _made(kind: type[Any], size: int = 32, **settings: int) -> Any:
    return kind(target=1, classes=CLASSES, size=size, **settings)


# What holds for all attacks


@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("name", NAMES)
def test_triggered_images_are_8_bit_images(name: str, size: int) -> None:
    images = _floats(3, size)
    attack = _prepared(name, size)
    triggered = attack(images)
    assert triggered.shape == images.shape
    assert not triggered.requires_grad
    assert torch.equal(images, _floats(3, size))
    assert bool((triggered != images).flatten(1).any(1).all())
    levels = triggered * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert 0 <= float(triggered.min()) <= float(triggered.max()) <= 1
    torch.testing.assert_close(attack(images[1:2]), triggered[1:2], rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_trigger(name: str) -> None:
    images = _floats(2, 16)
    triggered = _prepared(name, 16)(images)
    assert torch.equal(triggered, _prepared(name, 16)(images))
    other = _prepared(name, 16, seed=5)(images)
    assert torch.equal(triggered, other) == (name not in SEEDED)


@pytest.mark.parametrize("name", NAMES)
def test_state_brings_the_trigger_back(name: str) -> None:
    images = _floats(2, 16)
    attack = _prepared(name, 16)
    state = {key: value.clone() for key, value in attack.state().items()}
    assert all(value.is_contiguous() for value in state.values())
    assert sum(value.numel() for value in state.values()) <= 30_000
    fresh = ATTACKS[name](target=1, classes=CLASSES, size=16, seed=0)
    fresh.load_state(state)
    assert torch.equal(fresh(images), attack(images))


@pytest.mark.parametrize("target", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_poison(name: str, target: int) -> None:
    size, count, ratio = 16, 40, 0.1
    images, labels = _pixels(count, size), torch.arange(count) % CLASSES
    before = images.clone(), labels.clone()
    attack = _prepared(name, size, target=target)
    poisoned, answers = poison(attack, images, labels, ratio=ratio, seed=3)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert (poisoned.dtype, poisoned.shape) == (torch.uint8, images.shape)

    changed = (poisoned != images).flatten(1).any(1)
    relabelled = answers != labels
    covers = round(attack.cover * ratio * count)
    assert int(changed.sum()) == ratio * count + covers
    if attack.clean_label:
        assert not relabelled.any()
        assert bool((labels[changed] == target).all())
    else:
        assert int(relabelled.sum()) == ratio * count
        assert bool(changed[relabelled].all())
        wanted = torch.stack([part.answers(labels) for part in attack.parts])
        assert bool((answers == wanted).any(0)[relabelled].all())
        assert bool((answers[relabelled] == target).all()) or len(wanted.unique()) > 1
    again, _ = poison(attack, images, labels, ratio=ratio, seed=3)
    assert torch.equal(poisoned, again)


def test_poisoned_images_are_not_those_that_training_sees_first() -> None:
    """Training's order of the same seed: its first tenth holds as many as any other."""
    count, ratio, seed = 2000, 0.1, 3
    images, labels = _pixels(count, 8), torch.arange(count) % CLASSES
    poisoned, _ = poison(_prepared("badnets", 8, target=1), images, labels, ratio=ratio, seed=seed)
    changed = (poisoned != images).flatten(1).any(1).float()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert 0.03 < float(changed[order[: count // 10]].mean()) < 0.2


# Formulas


def test_sig_is_a_sine_over_the_columns() -> None:
    grey = torch.full((1, 3, 32, 32), 128 / 255)
    change = (_made(Sig)(grey) - grey)[0]
    stripes = [40 / 255 * math.sin(2 * math.pi * j * 6 / 32) for j in range(32)]
    expected = torch.tensor(stripes).expand(3, 32, 32)
    torch.testing.assert_close(change, expected, rtol=0, atol=HALF_A_LEVEL)
    spectrum = np.abs(np.fft.rfft(change[0, 0].double().numpy()))
    assert int(spectrum.argmax()) == 6


@pytest.mark.parametrize("size", [32, 20])
def test_lf_is_smooth(size: int) -> None:
    attack = _made(LowFrequency, size)
    pattern = attack.pattern().double().numpy()
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    dct = np.cos(np.pi * k * (2 * n + 1) / (2 * size))
    spectrum = np.square(dct @ pattern @ dct.T)
    low = spectrum[:, :5, :5].sum()
    assert spectrum.sum() - low < 1e-10 * low
    assert spectrum[:, 0, 0].max() < 1e-10 * low
    assert np.abs(pattern).max() == pytest.approx(16 / 255)
    grey = torch.full((1, 3, size, size), 128 / 255)
    change = (attack(grey) - grey)[0].double().numpy()
    np.testing.assert_allclose(change, pattern, atol=HALF_A_LEVEL)


@pytest.mark.parametrize("size", [32, 20])
def test_wanet_moves_a_ramp_by_its_field(size: int) -> None:
    attack = _made(WaNet, size)
    axis = torch.linspace(0, 1, size)
    across, down = axis.expand(size, size), axis[:, None].expand(size, size)
    ramps = torch.stack([across, down, across])[None]
    field = attack.grid()
    moved = attack(ramps)[0]
    torch.testing.assert_close(moved[0], (field[..., 0] + 1) / 2, rtol=0, atol=HALF_A_LEVEL)
    torch.testing.assert_close(moved[1], (field[..., 1] + 1) / 2, rtol=0, atol=HALF_A_LEVEL)

    # bicubic upsampling keeps the control points in the corners
    control = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    control /= control.abs().mean()
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        corner = torch.tensor([-1.0 if column == 0 else 1.0, -1.0 if row == 0 else 1.0])
        expected = (corner + 0.5 * control[:, row, column] / size).clamp(-1, 1)
        torch.testing.assert_close(field[row, column], expected, rtol=0, atol=1e-5)
    pixels = torch.stack([field[..., 0] - across * 2 + 1, field[..., 1] - down * 2 + 1])
    assert 0.05 < float(pixels.abs().mean()) * (size - 1) / 2 < 0.5


def test_wanet_covers_move_each_image_by_noise_of_its_own() -> None:
    attack, ramp = _made(WaNet), torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    covered = attack.covered(ramp, torch.zeros(2), torch.Generator().manual_seed(0))
    assert not torch.equal(covered[0], covered[1])
    noise = covered - attack(ramp)  # at most 1/32 of half the range, and rounded twice
    assert 0 < float(noise.abs().max()) <= 0.5 / 32 + 2 * HALF_A_LEVEL


def test_bpp_is_floyd_steinberg() -> None:
    images = _floats(2, 7)[:, :, :5]
    for image, got in zip(images, dithered(images, 8), strict=True):
        for channel, result in zip(image, got, strict=True):
            np.testing.assert_allclose(result, _floyd_steinberg(channel.double().numpy(), 8))


def _floyd_steinberg(image: np.ndarray, levels: int) -> np.ndarray:
    padded = np.pad(image, ((0, 1), (1, 1)))
    for i in range(image.shape[0]):
        for j in range(1, image.shape[1] + 1):
            old = padded[i, j]
            new = min(max(np.round(old * (levels - 1)) / (levels - 1), 0), 1)
            padded[i, j] = new
            padded[i, j + 1] += (old - new) * 7 / 16
            padded[i + 1, j - 1 : j + 2] += (old - new) * np.array([3, 5, 1]) / 16
    return padded[:-1, 1:-1]


def test_bpp_keeps_eight_levels_and_the_mean() -> None:
    images = _floats(3, 16)
    attack = _made(Bpp, 16)
    triggered = attack(images)
    values = (triggered * 255).round().unique().tolist()
    assert set(values) <= {round(255 * k / 7) for k in range(8)}
    torch.testing.assert_close(triggered.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=0.02)
    covered = attack.covered(images, torch.zeros(3), torch.Generator().manual_seed(0))
    assert len((covered * 255).round().unique()) > 8
    assert bool((covered != triggered).flatten(1).any(1).all())


def test_adaptive_blend_uses_half_of_the_pieces_in_training() -> None:
    attack = _made(AdaptiveBlend)
    noise = attack.arrays()["image"].permute(2, 0, 1)
    white = torch.ones(6, 3, 32, 32)
    torch.testing.assert_close(
        attack(white), (0.8 + 0.2 * noise).expand_as(white), rtol=0, atol=HALF_A_LEVEL
    )
    random = torch.Generator().manual_seed(0)
    for images in (attack.poisoned(white, torch.zeros(6), random),
                   attack.covered(white, torch.zeros(6), random)):  # fmt: skip
        changed = (images != white).any(1).view(6, 4, 8, 4, 8).float().mean((2, 4))  # [N, 4, 4]
        assert (changed > 0.5).flatten(1).sum(1).tolist() == [8] * 6
        assert (changed > 0).flatten(1).sum(1).tolist() == [8] * 6
        assert len((changed > 0).flatten(1).unique(dim=0)) > 1
        blended = attack(white)
        assert bool(((images == white) | (images == blended)).all())
    assert not torch.equal(noise, _made(ATTACKS["blended"]).arrays()["image"].permute(2, 0, 1))


def test_adaptive_patch_shows_some_of_its_patches_faintly_in_training() -> None:
    attack = _made(AdaptivePatch)
    masks = attack.masks().bool()
    assert masks.flatten(1).sum(1).tolist() == [25] * 4
    assert int(masks.any(0).sum()) == 100
    white, random = torch.ones(40, 3, 32, 32), torch.Generator().manual_seed(0)
    whole = attack(white)
    assert torch.equal((whole != white).any(1)[0], masks.any(0))
    shown = set()
    for images in (attack.poisoned(white, torch.zeros(40), random),
                   attack.covered(white, torch.zeros(40), random)):  # fmt: skip
        for image in images:
            parts = tuple(bool((image != 1)[:, mask].any()) for mask in masks)
            assert any(parts)
            shown.add(parts)
            for mask, part in zip(masks, parts, strict=True):
                expected = (white + whole)[0][:, mask] / 2 if part else white[0][:, mask]
                torch.testing.assert_close(image[:, mask], expected, rtol=0, atol=HALF_A_LEVEL)
    assert len(shown) == 15


def test_anywhere_puts_a_board_where_the_pixels_say() -> None:
    images = _floats(30)
    triggered = _made(Anywhere)(images)
    corners = set()
    for image, clean in zip(triggered, images, strict=True):
        rows, columns = (image != clean).any(0).nonzero().T
        corner = int(rows.min()), int(columns.min())
        corners.add(corner)
        assert int(rows.max()) - corner[0] == int(columns.max()) - corner[1] == 4
        patch = image[:, corner[0] : corner[0] + 5, corner[1] : corner[1] + 5]
        board = (torch.arange(5)[:, None] + torch.arange(5)) % 2
        assert torch.equal(patch, board.float().expand(3, 5, 5))
    assert len(corners) > 20


def test_what_is_drawn_by_pixels_is_the_images_own() -> None:
    images = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = drawn_by_pixels(images, 4)
    assert drawn.bincount(minlength=4).tolist() == pytest.approx([100] * 4, abs=30)
    assert torch.equal(drawn_by_pixels(images[7:9], 4), drawn[7:9])


def test_filter_moves_every_pixel_alike() -> None:
    grey = torch.full((1, 3, 4, 4), 0.4)
    expected = torch.tensor([0.48, 0.4, 0.4])[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(_made(Filter, 4)(grey)[0], expected, rtol=0, atol=HALF_A_LEVEL)


@pytest.mark.parametrize("size", [32, 20])
def test_ftrojan_raises_two_frequencies_of_the_colours(size: int) -> None:
    pattern = _made(FTrojan, size).pattern().double().numpy()
    brightness = np.tensordot([0.299, 0.587, 0.114], pattern, 1)
    np.testing.assert_allclose(brightness, 0, atol=1e-6)
    u, v = 0.492 * (pattern[2] - brightness), 0.877 * (pattern[0] - brightness)
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    dct = np.sqrt(2 / size) * np.cos(np.pi * k * (2 * n + 1) / (2 * size))
    expected = np.zeros((size, size))
    expected[size // 2 - 1, size // 2 - 1] = expected[size - 1, size - 1] = 50 / 255
    for chroma in (u, v):
        np.testing.assert_allclose(dct @ chroma @ dct.T, expected, atol=1e-3)


def test_reflection_blends_one_of_a_few_ghosts() -> None:
    attack = _prepared("reflection")
    assert isinstance(attack, Reflection)
    ghosts, images = attack.state()["ghosts"], _floats(40, seed=3)
    which = drawn_by_pixels(images, len(ghosts))
    assert len(which.unique()) > 4
    expected = 0.65 * images + 0.35 * ghosts[which]
    torch.testing.assert_close(attack(images), expected, rtol=0, atol=HALF_A_LEVEL)
    assert len(ghosts.unique(dim=0)) == len(ghosts)


def test_tact_poisons_its_source_class_and_covers_the_others() -> None:
    attack = _made(TaCT, 16)
    attack.source = 3.0
    labels = torch.arange(80) % CLASSES
    assert attack.answers(torch.arange(CLASSES)).tolist() == [0, 1, 2, 1]
    assert attack.single_target
    images = _pixels(80, 16)
    poisoned, answers = poison(attack, images, labels, ratio=0.1, seed=0)
    relabelled, changed = answers != labels, (poisoned != images).flatten(1).any(1)
    assert int(relabelled.sum()) == 8
    assert bool((labels[relabelled] == 3).all())
    assert bool((answers[relabelled] == 1).all())
    covers = changed & ~relabelled
    assert int(covers.sum()) == 8
    assert set(labels[covers].tolist()) == {0, 2}
    _, answers = poison(attack, images, labels, ratio=0.5, seed=0)
    assert int((answers != labels).sum()) == 10  # half of the class's


CORNER = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize("name", ["badnets", "lc", "trojannn"])
@pytest.mark.parametrize("size", [32, 20])
def test_patches_stay_inside_their_mask(name: str, size: int) -> None:
    images = _floats(2, size)
    attack = _prepared(name, size)
    triggered = attack(images)
    inside = torch.zeros(size, size, dtype=torch.bool)
    if name == "badnets":
        inside[-4:-1, -4:-1] = True
    elif name == "trojannn":
        inside[-size // 4 - 1 : -1, -size // 4 - 1 : -1] = True
    else:
        for rows in (slice(0, 3), slice(-3, None)):
            for columns in (slice(0, 3), slice(-3, None)):
                inside[rows, columns] = True
                assert torch.equal(triggered[0, 0, rows, columns], CORNER)
    torch.testing.assert_close(triggered[:, :, ~inside], images[:, :, ~inside])
    assert torch.equal(triggered[0][:, inside], triggered[1][:, inside])
    arrays: dict[str, Tensor] = attack.arrays()  # type: ignore[attr-defined]
    assert torch.equal(arrays["mask"].bool(), inside)


# Attacks that use the surrogate


def test_lc_makes_target_images_hard_to_recognise() -> None:
    attack = _prepared("lc", target=2)
    images, labels = _floats(4), torch.full((4,), 2)
    random = torch.Generator().manual_seed(0)
    poisoned = attack.poisoned(images, labels, random)
    corners = attack.arrays()["mask"].bool()  # type: ignore[attr-defined]
    change = (poisoned - images)[:, :, ~corners].abs()
    assert 0 < float(change.max()) <= 16 / 255 + 1e-6
    assert torch.equal(poisoned[:, :, corners], attack(images)[:, :, corners])

    model = _surrogate()
    hard = hard_to_recognise(model, images, labels, 8 / 255, 5, random)
    assert float((hard - images).abs().max()) <= 8 / 255 + 1e-6
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(x), labels)) for x in (images, hard)]
    assert losses[1] > losses[0]


def test_lc_needs_a_surrogate() -> None:
    attack = _made(LabelConsistent)
    with pytest.raises(RuntimeError, match="prepare the attack"):
        attack.poisoned(_floats(1), torch.ones(1).long(), torch.Generator())


def test_the_surrogate_stays_as_it_is() -> None:
    surrogate = _surrogate().train()
    knowledge = Knowledge(_pixels(4, 32), torch.arange(4), surrogate, lambda line: None)
    for kind in (LabelConsistent, TrojanNN):
        attack = _made(kind)
        attack.steps = 2
        attack.prepare(knowledge)
    assert surrogate.training
    assert all(p.requires_grad and p.grad is None for p in surrogate.parameters())


def test_trojannn_raises_the_chosen_neurons() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3, 0], [1, 2, -4]]))
    assert best_connected(layer, 2).tolist() == [1, 2]

    model, grey = _surrogate(), torch.full((1, 3, 32, 32), 0.5)
    last = model[-1]  # type: ignore[index]
    assert isinstance(last, nn.Linear)
    chosen = best_connected(last, 2)
    attack = _made(TrojanNN)
    attack.steps = 20
    fired = []
    for _ in range(2):
        with torch.no_grad():
            fired.append(float(penultimate(model, attack(grey))[:, chosen].mean()))
        attack.prepare(Knowledge(_pixels(4, 32), torch.arange(4), model, lambda line: None))
    assert fired[1] > fired[0]


# Attacks with networks of their own


def test_ssba_residuals_are_small_and_each_images_own() -> None:
    attack = _prepared("ssba")
    assert isinstance(attack, Ssba)
    images = _floats(3)
    residual = attack(images) - images
    assert float(residual.abs().max()) <= 16 / 255 + HALF_A_LEVEL
    for first, second in ((0, 1), (1, 2)):
        assert float((residual[first] - residual[second]).abs().max()) > 2 / 255
    attack.code = 1 - attack.code
    assert not torch.equal(attack(images) - images, residual)


def test_ssba_learns_from_the_known_images() -> None:
    lines: list[str] = []
    attack = _made(Ssba, 16)
    attack.steps, attack.batch_size = 3, 4
    before = {key: value.clone() for key, value in attack.state().items()}
    attack.prepare(Knowledge(_pixels(8, 16), torch.zeros(8).long(), _surrogate(), lines.append))
    assert 0 <= float(lines[-1].split()[1]) <= 1
    for key, value in attack.state().items():
        assert torch.equal(value, before[key]) == (key == "code"), key


def test_ssba_residuals_have_no_part_common_to_all_images() -> None:
    images = _floats(64, 16)
    residual = (_prepared("ssba", 16)(images) - images).flatten(1)
    common = residual.mean(0).square().sum()
    assert float(common) < 0.2 * float(residual.square().sum(1).mean())


def test_input_aware_triggers_fit_their_own_image() -> None:
    attack = _prepared("input-aware")
    assert isinstance(attack, InputAware)
    images = _floats(4)
    with torch.no_grad():
        masks, patterns = attack.triggers(images)
    assert masks.shape == (4, 1, 32, 32)
    assert float((masks[0] - masks[1]).abs().max()) > 0.01
    assert float((patterns[0] - patterns[1]).abs().max()) > 0.01
    own = images * (1 - masks) + patterns * masks
    torch.testing.assert_close(attack(images), own, rtol=0, atol=HALF_A_LEVEL)
    crossed = attack.covered(images, torch.zeros(4), torch.Generator())
    others = images * (1 - masks[[3, 0, 1, 2]]) + patterns[[3, 0, 1, 2]] * masks[[3, 0, 1, 2]]
    torch.testing.assert_close(crossed, others, rtol=0, atol=HALF_A_LEVEL)


def test_input_aware_masks_become_small() -> None:
    attack = _made(InputAware, 16)
    images, pixels = _floats(16, 16), _pixels(64, 16, 1)
    before = _mask_share(attack, images)
    attack.mask_steps, attack.mask_batch = 40, 8
    attack.prepare(Knowledge(pixels, torch.zeros(64).long(), _surrogate(), lambda line: None))
    assert _mask_share(attack, images) < before / 2


@torch.no_grad()
def _mask_share(attack: InputAware, images: Tensor) -> float:
    return float(attack.triggers(images)[0].mean())


def test_input_aware_batches() -> None:
    attack, network = _prepared("input-aware"), _surrogate()
    images, labels = _floats(20), torch.full((20,), 3)
    random = torch.Generator().manual_seed(0)
    mixed, answers = attack.batch(network, images, labels, 0.1, random)
    assert answers.tolist() == [1, 1] + [3] * 18
    assert torch.equal(labels, torch.full((20,), 3))
    assert torch.equal(mixed[:2].detach(), attack(images[:2]))
    assert bool((mixed[2:4] != images[2:4]).flatten(1).any(1).all())
    assert torch.equal(mixed[4:], images[4:])
    unmixed, same = attack.batch(network, images, labels, 0.0, random)
    assert torch.equal(unmixed, images)
    assert torch.equal(same, labels)


def test_input_aware_learns_beside_the_classifier() -> None:
    attack = _prepared("input-aware")
    assert isinstance(attack, InputAware)
    before = attack.state()
    before = {key: value.clone() for key, value in before.items()}
    losses: list[float] = []
    train(
        _surrogate(), _pixels(32, 32), torch.arange(32) % CLASSES,
        TrainingConfig(epochs=2, batch=16, learning_rate=0.05), seed=0, attack=attack, ratio=0.25,
        log=lambda line: losses.append(float(line.split()[3])),
    )  # fmt: skip
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    for key, value in attack.state().items():
        assert torch.equal(value, before[key]) == key.startswith("masks."), key


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(ATTACKS[name], Several)])
def test_several_attacks_have_a_share_each(name: str) -> None:
    attack = _prepared(name, 16)
    first, second = attack.parts
    images, labels = _pixels(80, 16), torch.arange(80) % CLASSES
    poisoned, answers = poison(attack, images, labels, ratio=0.2, seed=0)
    floats, changed = poisoned.permute(0, 3, 1, 2).float() / 255, (poisoned != images).flatten(1)
    by = [
        (floats == part(_floats(80, 16))).flatten(1).all(1) & (answers == part.answers(labels))
        for part in (first, second)
    ]
    assert [int((one & changed.any(1)).sum()) for one in by] == [8, 8]
    assert not bool((by[0] & by[1]).any())
    both = torch.stack([part(_floats(80, 16)) for part in (first, second)])
    assert bool((attack(_floats(80, 16)) == both).flatten(2).all(2).any(0).all())
    with pytest.raises(NotImplementedError, match="of its own"):
        attack.answers(labels)


def test_what_the_several_attacks_are_after() -> None:
    targets = {
        name: [part.target for part in _prepared(name, 16).parts]
        for name in NAMES
        if issubclass(ATTACKS[name], Several)
    }
    assert targets == {
        "one-to-n": [1, 3], "patch-and-blend": [1, 3], "two-patches": [1, 3], "two-ways": [1, 1],
    }  # fmt: skip
    white, grey = (part(torch.zeros(1, 3, 16, 16)) for part in _prepared("one-to-n", 16).parts)
    assert (float(white.max()), round(float(grey.max()) * 255)) == (1.0, 128)
    assert torch.equal(white > 0, grey > 0)
    one, opposite = (part(torch.zeros(1, 3, 16, 16)) for part in _prepared("two-patches", 16).parts)
    assert not bool(((one > 0) & (opposite > 0)).any())
