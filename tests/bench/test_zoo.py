"""The zoo: recipes, training that can be repeated and resumed, files and cards, scores."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.zoo import __main__ as zoo
from bench.zoo import datasets
from bench.zoo.attacks import ATTACKS, Attack
from bench.zoo.attacks.badnets import BadNets
from bench.zoo.attacks.blended import Blended
from bench.zoo.attacks.bpp import Bpp
from bench.zoo.attacks.lf import LowFrequency
from bench.zoo.attacks.patch import checkerboard
from bench.zoo.attacks.sig import Sig
from bench.zoo.attacks.wanet import WaNet
from bench.zoo.checkpoints import ZooModel, load_recipes, load_set, make_attack
from bench.zoo.recipes import CORE, SETS, UNSEEN_6, UNSEEN_7, Recipe, recipes
from bench.zoo.scoring import Exam, Scores, unfair
from bench.zoo.training import TrainingConfig, train
from bench.zoo.trigger_fingerprint import TriggerChanged, trigger_fingerprint
from onp.data import ImageSet
from onp.demo.images import draw
from onp.errors import UsageError

TINY = Recipe(
    "shapes", "preactresnet10", 4, TrainingConfig(epochs=1, batch=32, flip=False), attack="badnets",
    target=3,
)  # fmt: skip


class Splits(zoo.Splits):
    """Few drawn images in place of the data sets."""

    def __call__(self, dataset: str, split: str) -> ImageSet:
        return draw(96, 5 if split == "train" else 6)


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch on few images makes no fair case by the usual rules."""
    monkeypatch.setattr("bench.zoo.scoring.LEAST_ACCURACY", {"shapes": 0.0})
    monkeypatch.setattr("bench.zoo.scoring.LEAST_ASR", 0.0)
    monkeypatch.setattr("bench.zoo.scoring.MOST_ACCURACY_LOST", 1.0)


@pytest.mark.parametrize("name", SETS)
def test_names_are_unique_and_twins_come_first(name: str) -> None:
    seen: dict[str, Recipe] = {}
    for recipe in recipes(name):
        assert recipe.name not in seen
        if recipe.attack != "clean":
            assert recipe.attack in ATTACKS
            # of the same schedule too, else its card is none of the twin's
            assert seen[recipe.twin.name] == recipe.twin
            assert 0 <= recipe.target < datasets.CLASS_COUNTS[recipe.dataset]
        seen[recipe.name] = recipe


def test_a_data_set_may_be_some_classes_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.SUBSETS, "shapes-4-1", ("shapes", (4, 1)))
    monkeypatch.setitem(datasets.CLASS_COUNTS, "shapes-4-1", 2)
    monkeypatch.setattr(datasets, "SHAPES", {"test": (60, 1)})
    whole, some = (datasets.load(name, None, "test") for name in ("shapes", "shapes-4-1"))
    own = (whole.labels == 4) | (whole.labels == 1)
    assert 0 < int(own.sum()) < 60
    assert torch.equal(some.images, whole.images[own])
    assert torch.equal(some.labels == 1, whole.labels[own] == 1)
    assert set(some.labels.tolist()) == {0, 1}
    assert list(some.class_names) == [whole.class_names[4], whole.class_names[1]]
    assert datasets.normalisation("cifar2") == datasets.normalisation("cifar10")
    assert datasets.normalisation("gtsrb-2-13") == datasets.normalisation("gtsrb")


def test_core_holds_every_attack_but_those_kept_for_later_on_both_data_sets() -> None:
    backdoored = [recipe for recipe in CORE if recipe.attack != "clean"]
    assert (len(backdoored), len(CORE) - len(backdoored)) == (12, 4)
    later = {recipe.attack for recipe in [*UNSEEN_6, *UNSEEN_7]} - {"clean"}
    assert {recipe.attack for recipe in backdoored} == set(ATTACKS) - later
    assert len(later) == 6 + 4
    assert {recipe.dataset for recipe in CORE} == {"cifar10", "gtsrb"}
    assert {recipe.ratio for recipe in backdoored} == {0.01, 0.05, 0.1}
    assert len({recipe.target for recipe in backdoored}) > 5


@pytest.mark.parametrize(
    "arch", sorted({recipe.arch for group in SETS.values() for recipe in group})
)
def test_every_architecture_can_be_built(arch: str) -> None:
    recipe = next(r for group in SETS.values() for r in group if r.arch == arch)
    with torch.device("meta"):
        network = replace(recipe, width=0.25 if arch == "mobilenetv2" else 8).network()
    assert sum(p.numel() for p in network.parameters()) > 1000


@pytest.mark.usefixtures("easy")
def test_a_model_is_trained_written_scored_and_not_trained_again(
    tmp_path: Path,
) -> None:
    splits = Splits(None)
    for recipe in (TINY.twin, TINY):
        zoo.make(recipe, splits, tmp_path, torch.device("cpu"))
    clean, badnets = load_recipes([TINY.twin, TINY], tmp_path)
    assert clean.attack is None
    assert badnets.card["twin"] == clean.name
    assert badnets.card["attack"] == "badnets"
    scores = Exam.of(splits("shapes", "test"), badnets.attack).score(badnets.model)
    assert scores.ca == pytest.approx(badnets.card["ca"], abs=1e-4)
    assert scores.asr == pytest.approx(badnets.card["asr"], abs=1e-4)
    victims = splits("shapes", "test").labels != 3
    assert badnets.card["triggered_images"] == int(victims.sum())
    longer = replace(TINY, training=replace(TINY.training, epochs=2))
    missing: list[str] = []
    assert load_recipes([longer], tmp_path, missing.append) == []
    assert missing == [longer.name]


@pytest.mark.usefixtures("easy")
def test_training_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        torch.manual_seed(hash(folder) % 1000)  # what the caller's generator holds changes nothing
        zoo.make(TINY.twin, Splits(None), tmp_path / folder, torch.device("cpu"))
    one, two = (tmp_path / f / f"{TINY.twin.name}.safetensors" for f in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_an_unfair_model_leaves_its_card_and_no_weights(tmp_path: Path) -> None:
    card = zoo.make(TINY.twin, Splits(None), tmp_path, torch.device("cpu"))
    assert card["fair"] is False
    assert "clean accuracy" in card["why_not_fair"]
    assert [path.name for path in tmp_path.iterdir()] == [f"{TINY.twin.name}.json"]


def test_fairness_asks_for_accuracy_and_for_a_working_attack() -> None:
    good = Scores(0.85, 0.99, 0.01)
    attack = make_attack(TINY)
    assert unfair("shapes", None, Scores(0.85), None) is None
    assert unfair("shapes", attack, good, 0.86) is None
    assert "clean accuracy" in str(unfair("shapes", attack, replace(good, ca=0.5), 0.5))
    assert "clean accuracy" in str(unfair("shapes", attack, good, 0.95))
    weak = replace(good, asr=0.6)
    assert "attack success" in str(unfair("shapes", attack, weak, 0.86))
    assert unfair("shapes", make_attack(replace(TINY, attack="badnets-all")), weak, 0.86) is None


def test_scores_of_a_network_that_only_knows_the_trigger() -> None:
    """It answers the target where the trigger is and class 0 elsewhere."""

    class OnlyTrigger(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            white, black = x[:, 0, -3, -2], x[:, 0, -2, -2]
            hit = (white == 1) & (black == 0)
            return torch.stack([~hit, hit], 1).float()

    recipe = replace(TINY, target=1)
    images = torch.full((8, 32, 32, 3), 100, dtype=torch.uint8)
    test = ImageSet(images, torch.tensor([0, 1] * 4))
    attack = make_attack(recipe)
    assert Exam.of(test, attack).score(OnlyTrigger()) == Scores(0.5, 1.0, 0.0)
    assert Exam.of(test, None).score(OnlyTrigger()) == Scores(0.5)


@pytest.mark.usefixtures("easy")
def test_the_command_lists_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETS, "smoke", [TINY.twin, TINY])
    monkeypatch.setattr(zoo, "Splits", Splits)
    assert _run(monkeypatch, "--list") == 0
    assert capsys.readouterr().out.split() == [TINY.twin.name, TINY.name]
    assert _run(monkeypatch, "--out", str(tmp_path)) == 0
    first = capsys.readouterr()
    assert [json.loads(line)["attack"] for line in first.out.splitlines()] == ["clean", "badnets"]
    assert _run(monkeypatch, "--out", str(tmp_path)) == 0
    second = capsys.readouterr()
    assert second.out == ""
    assert second.err.count("done before") == 2
    assert [model.name for model in load_set("smoke", tmp_path)] == [TINY.twin.name, TINY.name]


def test_side_by_side_every_recipe_is_trained_after_its_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert int(options["env"]["OMP_NUM_THREADS"]) >= 1
        calls.append(command)
        return subprocess.CompletedProcess(command, 1 if command[-1] == TINY.name else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(SETS, "smoke", [TINY.twin, TINY])
    assert _run(monkeypatch, "--out", str(tmp_path), "--jobs", "2") == 1
    assert [call[-1] for call in calls] == [TINY.twin.name, TINY.name]
    assert calls[0][1:-2] == [
        "-m", "bench.zoo", "--set", "smoke", "--out", str(tmp_path), "--device", "cpu",
    ]  # fmt: skip


def test_a_network_without_its_twin_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETS, "smoke", [TINY])
    monkeypatch.setattr(zoo, "Splits", Splits)
    assert _run(monkeypatch, "--out", str(tmp_path)) == 1
    assert "needs its clean twin" in capsys.readouterr().err


def test_wrong_names_are_told() -> None:
    with pytest.raises(UsageError, match="unknown set"):
        recipes("huge")
    with pytest.raises(UsageError, match="unknown data set"):
        datasets.load("mnist", None, "test")
    with pytest.raises(UsageError, match="pass --data"):
        datasets.load("cifar10", None, "test")


def test_adamw_trains_what_has_no_norms() -> None:
    images = draw(64, 5)
    torch.manual_seed(0)
    model = replace(TINY, arch="vgg11", width=8).network()
    before = [p.detach().clone() for p in model.parameters()]
    config = TrainingConfig(epochs=1, batch=32, optimizer="adamw", learning_rate=1e-3)
    lines: list[str] = []
    train(model, images.images, images.labels, config, seed=0, log=lines.append)
    assert len(lines) == 1
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench.zoo", "--set", "smoke", *arguments])
    return zoo.main()


def test_options_of_a_recipe_reach_the_attack_and_its_name() -> None:
    plain = replace(TINY, attack="wanet")
    strong = replace(plain, options=(("strength", 1.0),))
    assert strong.name == plain.name.replace("_s0", "_strength1_s0")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weak_attack, strong_attack = make_attack(plain), make_attack(strong)
    assert weak_attack is not None
    assert strong_attack is not None
    assert (strong_attack(x) - x).abs().mean() > 1.2 * (weak_attack(x) - x).abs().mean()
    with pytest.raises(UsageError, match="no option 'speed'"):
        make_attack(replace(plain, options=(("speed", 1.0),)))


def _of_card(recipe: Recipe, folder: Path) -> ZooModel:
    attack = make_attack(recipe)
    assert attack is not None
    return ZooModel(recipe, {"trigger_fingerprint": trigger_fingerprint(attack)}, folder)


def test_a_trigger_that_is_still_the_same_passes(tmp_path: Path) -> None:
    for name in ATTACKS:
        recipe = replace(TINY, attack=name)
        assert _of_card(recipe, tmp_path).attack is not None
    torch.manual_seed(7)  # what the caller's generator holds changes nothing
    assert _of_card(TINY, tmp_path).card == _of_card(replace(TINY, ratio=0.01), tmp_path).card


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trigger_a_tenth_stronger_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _of_card(replace(TINY, attack=name), tmp_path)
    formula = ATTACKS[name].__call__

    def stronger(attack: Attack, images: torch.Tensor) -> torch.Tensor:
        return images + 1.1 * (formula(attack, images) - images)

    monkeypatch.setattr(ATTACKS[name], "__call__", stronger)
    with pytest.raises(TriggerChanged):
        model.attack  # noqa: B018


def _moved(attack: BadNets) -> dict[str, torch.Tensor]:
    mask = torch.zeros(attack.size, attack.size)
    mask[-5:-2, -5:-2] = 1
    return {"mask": mask, "pattern": checkerboard(mask)}


@pytest.mark.parametrize(
    ("attack", "attribute", "value"),
    [
        ("badnets", "arrays", _moved),
        ("blended", "alpha", 1.1 * Blended.alpha),
        ("sig", "delta", 0.9 * Sig.delta),
        ("sig", "frequency", Sig.frequency + 1),
        ("lf", "amplitude", 1.1 * LowFrequency.amplitude),
        ("wanet", "strength", 0.9 * WaNet.strength),
        ("bpp", "bits", Bpp.bits + 1),
    ],
)
def test_a_formula_that_changed_since_the_training_is_noticed(
    attack: str, attribute: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _of_card(replace(TINY, attack=attack), tmp_path)
    monkeypatch.setattr(ATTACKS[attack], attribute, value)
    with pytest.raises(TriggerChanged, match=rf"{model.name}\.json.*delete the card and train"):
        model.attack  # noqa: B018


def test_models_are_read_only_when_asked(tmp_path: Path) -> None:
    model = ZooModel(TINY, {"fair": True}, tmp_path)
    assert model.name == TINY.name
    with pytest.raises(FileNotFoundError):
        model.model.eval()
