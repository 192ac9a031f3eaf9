"""The scoreboard on a stub zoo whose scores are known by construction."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import side_by_side
from bench.defences.api import Defence, Info, NotApplicable
from bench.defences.known_trigger import KNOWN_TRIGGER
from bench.scoreboard import memory
from bench.scoreboard.cli import costly_first, default_out, main
from bench.scoreboard.commands import commands
from bench.scoreboard.figures import cost_points, draw_figures, tradeoff_points
from bench.scoreboard.leaderboard import public_means
from bench.scoreboard.markdown import environment, main_table
from bench.scoreboard.memory import PeakMemory
from bench.scoreboard.rows import Row, append_rows, der, plain, read_rows
from bench.scoreboard.run import Job, duration
from bench.scoreboard.scoring import TEST_SEED
from bench.scoreboard.summary import NO_DEFENCE, aggregate, summarise
from bench.zoo.attacks import Attack
from bench.zoo.attacks.badnets import BadNets, BadNetsAllToAll
from bench.zoo.attacks.several import TwoPatches
from bench.zoo.checkpoints import ZooModel as StoredModel
from bench.zoo.checkpoints import make_attack, read_card, save
from bench.zoo.datasets import fingerprint
from bench.zoo.recipes import recipes
from bench.zoo.scoring import Exam
from onp.data import ImageSet, draw_balanced
from onp.demo.images import draw
from onp.errors import BadData, UsageError
from onp.ledger import Ledger

TARGET, CLASSES = 0, 10
_STEP = 20
"""The first pixel of an image is its label times this."""


class Reader(nn.Module):
    """Reads the label from the first pixel; triggered images of ``moved`` go to the target."""

    def __init__(self, moved: Iterable[int] = (), confused: Iterable[int] = ()) -> None:
        super().__init__()
        self.moved = set(moved)
        self.confused = set(confused)
        """Classes that are answered with the next one."""

    def forward(self, x: Tensor) -> Tensor:
        labels = (x[:, 0, 0, 0] * 255 / _STEP).round().long()
        triggered = x[:, 0, 28, 29] == 1
        answers = labels.clone()
        for label in range(CLASSES):
            if label in self.confused:
                answers[labels == label] = (label + 1) % CLASSES
            if label in self.moved:
                answers[(labels == label) & triggered] = TARGET
        return nn.functional.one_hot(answers, CLASSES).float()


def images(name: str, _data: Path | None, split: str) -> ImageSet:
    """Drawn images with the label in the first pixel and no white where the trigger is."""
    if name == "none":
        raise BadData("clean data not found: none")
    drawn = draw({"train": 200, "test": 150}[split], {"train": 1, "test": 2}[split])
    pixels = drawn.images.clone()
    pixels[:, 0, 0] = (drawn.labels * _STEP).to(torch.uint8)[:, None]
    pixels[:, 28, 29].clamp_(max=200)
    return ImageSet(pixels, drawn.labels)


@dataclass
class ZooModel:
    card: dict[str, Any]
    model: nn.Module
    attack: Attack | None
    digest: str = "aaaaaaaaaaaa"


def subject(name: str, model: nn.Module, *, attack: str = "badnets", **card: Any) -> ZooModel:
    trigger = None if attack == "clean" else BadNets(target=TARGET, classes=CLASSES)
    common = {
        "name": name, "dataset": "shapes", "arch": "reader", "attack": attack, "ratio": 0.1,
        "target": TARGET, "seed": 0, "classes": CLASSES, "ca": 1.0, "asr": 1.0, "twin": None,
        "fair": True, "why_not_fair": None, "parameters": 10,
    }  # fmt: skip
    return ZooModel(common | card, model, trigger)


Change = Callable[[Any, ImageSet, Info], nn.Module]


def nothing(model: Reader, _clean: ImageSet, _info: Info) -> nn.Module:
    return model


def cure(model: Reader, _clean: ImageSet, info: Info) -> nn.Module:
    before = deepcopy(model)
    info.candidates = [("none", lambda: before), ("all", Reader)]
    info.settings = {"verdict": "backdoor", "pruned": 2, "scores": torch.tensor([1.0, 2.0])}
    model.moved, model.confused = set(), {5}
    return model


@dataclass
class Stubs:
    """The zoo and the defences of one test, and what ran."""

    zoo: list[ZooModel]
    out: Path
    defences: dict[str, Defence] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)

    def add(self, name: str, change: Change) -> None:
        """A defence that does what ``change`` does to the model and to what it tells."""

        def defence(
            model: nn.Module, clean: ImageSet, *, seed: int, ledger: Ledger
        ) -> tuple[nn.Module, Info]:
            self.calls.append((name, seed))
            ledger.count(3 * len(clean))
            info = Info(schedule="1 of 2 epochs")
            return change(model, clean, info), info

        self.defences[name] = defence

    def only(self, **changes: Change) -> None:
        """These defences and no others."""
        self.defences.clear()
        for name, change in changes.items():
            self.add(name, change)

    def load(self, _set: str, _folder: Path, missing: Callable[[str], None]) -> Sequence[ZooModel]:
        missing("untrained")
        return self.zoo

    def run(self, *options: str) -> int:
        argv = ["--test-images", "100", "--clean-samples", "50", "--out", str(self.out), *options]
        return main(argv, self.load, images, self.defences)

    def rows(self) -> dict[tuple[str, str, int, bool], Row]:
        rows = read_rows(self.out).values()
        return {(row.model, row.defence, row.seed, row.oracle): row for row in rows}


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    zoo = [
        subject("patched", Reader(range(CLASSES)), twin="twin"),
        subject("twin", Reader({1}), attack="clean", asr=None),
        subject("faint", Reader({1, 2}), twin="twin", fair=False, why_not_fair="ASR below 90%"),
    ]
    made = Stubs(zoo, tmp_path / "rows.jsonl")

    def refuse(_model: Reader, _clean: ImageSet, _info: Info) -> nn.Module:
        raise NotApplicable("no batch norm")

    def fail(_model: Reader, _clean: ImageSet, _info: Info) -> nn.Module:
        raise ValueError("two\nlines")

    made.only(cure=cure, nothing=nothing, refuse=refuse, fail=fail)
    return made


def row(model: str = "m", defence: str = "d", seed: int = 0, **changes: Any) -> Row:
    """A backdoored row: CA .9 to .8, ASR 1 to .2 with .05 on the twin."""
    made = Row(
        model=model, dataset="shapes", arch="reader", attack="badnets", ratio=0.1, target=0,
        defence=defence, seed=seed, clean_samples=500, ca_before=0.9, ca_after=0.8, asr_before=1.0,
        asr_after=0.2, asr_clean_twin=0.05, ra_before=0.0, ra_after=0.7, excess_asr=0.15, der=0.85,
        der_ceiling=1.0, der_shortfall=0.15, seconds=10.0, image_forwards=100, test_images=100,
        peak_memory_mb=200.0, cpu_seconds=15.0,
    )  # fmt: skip
    return replace(made, **changes)


def card(name: str, attack: str = "badnets", arch: str = "reader") -> dict[str, Any]:
    return {"name": name, "attack": attack, "arch": arch, "dataset": "shapes"}


# ---- scores ------------------------------------------------------------------------------------


def test_der_by_hand() -> None:
    assert der(1.0, 0.1, 0.9, 0.8) == pytest.approx((0.9 - 0.1 + 1) / 2)
    assert der(0.9, 0.9, 0.9, 0.9) == 0.5
    assert der(0.5, 0.8, 0.8, 0.9) == 0.5  # neither more ASR nor more CA counts
    assert der(0.0, 0.0, 1.0, 0.0) == 0.0  # a lost network


def test_row_of_a_repair(stubs: Stubs) -> None:
    assert stubs.run("--models", "patched", "--defences", "cure") == 0
    made = stubs.rows()["patched", "cure", 0, False]
    assert (made.test_images, made.triggered_images) == (100, 90)
    assert (made.ca_before, made.asr_before, made.ra_before) == (1.0, 1.0, 0.0)
    assert made.ca_after == 0.9  # class 5 is lost
    assert made.asr_after == 0.0
    assert made.ra_after == pytest.approx(80 / 90, abs=1e-6)
    assert made.asr_clean_twin == pytest.approx(10 / 90, abs=1e-6)  # the twin's class 1
    assert made.excess_asr == pytest.approx(-10 / 90, abs=1e-6)
    assert (made.der, made.der_ceiling) == (0.95, 1.0)
    assert made.der_shortfall == pytest.approx(0.05)
    assert made.image_forwards == 3 * 50  # scoring is not counted
    assert (made.schedule, made.verdict, made.pruned) == ("1 of 2 epochs", "backdoor", 2)
    assert made.settings["scores"] == [1.0, 2.0]
    assert made.seconds is not None
    assert made.cpu_seconds is not None
    assert (made.jobs, made.oracle_images) == (1, None)
    tested = draw_balanced(images("shapes", None, "test"), 100, TEST_SEED)
    assert (made.weights, made.test_data) == ("aaaaaaaaaaaa", fingerprint(tested))
    assert made.torch == torch.__version__
    assert made.threads == torch.get_num_threads()


def test_networks_are_not_changed_by_a_defence_that_should_not(stubs: Stubs) -> None:
    stubs.run("--defences", "cure", "nothing")
    assert stubs.rows()["patched", "nothing", 0, False].asr_after == 1.0


def test_clean_twins_have_accuracy_alone(stubs: Stubs) -> None:
    assert stubs.run("--models", "twin", "--defences", "cure") == 0
    assert list(stubs.rows()) == [("twin", "cure", 0, False)]  # nothing for an oracle to pick by
    made = stubs.rows()["twin", "cure", 0, False]
    assert (made.ca_before, made.ca_after) == (1.0, 0.9)
    absent = (made.asr_before, made.asr_after, made.asr_clean_twin, made.excess_asr, made.ra_after)
    assert absent == (None,) * 5
    assert (made.der, made.der_ceiling, made.triggered_images) == (None, None, None)


def test_all_to_all_takes_every_image_and_its_own_answer() -> None:
    attack = BadNetsAllToAll(target=0, classes=CLASSES)
    exam = Exam.of(images("shapes", None, "test"), attack)
    assert exam.triggered is not None
    assert len(exam.triggered) == 150
    scores = exam.score(Reader(confused=range(CLASSES)))
    assert (scores.ca, scores.asr, scores.ra) == (0.0, 1.0, 0.0)


def test_each_of_several_attacks_has_every_other_image() -> None:
    attack, test = TwoPatches(target=TARGET, classes=CLASSES), images("shapes", None, "test")
    exam = Exam.of(test, attack)
    assert exam.triggered is not None
    assert exam.wanted is not None
    turns = torch.arange(len(test)) % 2
    wanted = torch.tensor([part.target for part in attack.parts])[turns]
    victims = wanted != test.labels
    assert torch.equal(exam.wanted, wanted[victims])
    expected = torch.stack([part(test.floats()) for part in attack.parts])
    assert torch.equal(exam.triggered.floats(), expected[turns, torch.arange(len(test))][victims])


def test_triggered_images_survive_the_way_through_bytes() -> None:
    attack, test = BadNets(target=TARGET, classes=CLASSES), images("shapes", None, "test")
    exam = Exam.of(test, attack)
    assert exam.triggered is not None
    assert torch.equal(exam.triggered.floats(), attack(test[test.labels != TARGET].floats()))


def test_nothing_to_trigger_is_refused() -> None:
    test = images("shapes", None, "test")
    with pytest.raises(BadData, match="ASR is undefined"):
        Exam.of(test[test.labels == TARGET], BadNets(target=TARGET, classes=CLASSES))


def test_defences_get_balanced_training_images(stubs: Stubs) -> None:
    seen: list[ImageSet] = []

    def spy(model: Reader, clean: ImageSet, _info: Info) -> nn.Module:
        seen.append(clean)
        return model

    stubs.only(spy=spy)
    assert stubs.run("--models", "patched", "--seeds", "0", "1") == 0
    assert all(torch.equal(c.labels.bincount(), torch.full((10,), 5)) for c in seen)
    train = {bytes(image.numpy()) for image in images("shapes", None, "train").images}
    assert all(bytes(image.numpy()) in train for clean in seen for image in clean.images)
    assert not torch.equal(seen[0].images, seen[1].images)


def test_defences_cannot_disturb_each_others_draws(stubs: Stubs) -> None:
    drawn: list[float] = []

    def draws(model: Reader, _clean: ImageSet, _info: Info) -> nn.Module:
        drawn.append(float(torch.rand(())))
        return model

    stubs.only(first=draws, second=draws)
    state = torch.get_rng_state()
    assert stubs.run("--models", "patched") == 0
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), state)


# ---- resuming ----------------------------------------------------------------------------------


def test_second_run_runs_nothing(stubs: Stubs) -> None:
    assert stubs.run("--defences", "cure", "nothing", "--seeds", "0", "1") == 0
    assert len(stubs.calls) == 2 * 2 * 2
    content = stubs.out.read_bytes()
    assert stubs.run("--defences", "cure", "nothing", "--seeds", "0", "1") == 0
    assert len(stubs.calls) == 2 * 2 * 2
    assert stubs.out.read_bytes() == content


@pytest.fixture
def processes(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a run side by side run in this one, where the stubs are."""
    lock = threading.Lock()

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[1:3] == ["-m", "bench.scoreboard"]
        assert int(settings["env"]["OMP_NUM_THREADS"]) >= 1
        with lock:
            code = main(command[3:], stubs.load, images, stubs.defences)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(side_by_side, "subprocess", SimpleNamespace(run=run))


@pytest.mark.usefixtures("processes")
def test_side_by_side_gives_the_same_rows(stubs: Stubs) -> None:
    options = ("--defences", "cure", "nothing", "--jobs", "2", "--oracle-images", "40")
    assert stubs.run(*options) == 0
    beside = stubs.rows()
    assert len(stubs.calls) == 4
    assert stubs.run(*options) == 0
    assert len(stubs.calls) == 4
    stubs.out.unlink()
    assert stubs.run(*options[:3], *options[5:]) == 0
    assert {made.jobs for made in beside.values()} == {2}
    assert {made.jobs for made in stubs.rows().values()} == {1}
    assert beside.keys() == stubs.rows().keys()
    for key, alone in stubs.rows().items():
        assert beside[key].asr_after == alone.asr_after
        assert beside[key].settings == alone.settings


def test_a_process_beside_that_fails_is_told(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(side_by_side, "subprocess", SimpleNamespace(run=run))
    assert stubs.run("--defences", "nothing", "--jobs", "2") == 1
    assert stubs.rows() == {}


def test_what_costs_most_starts_first() -> None:
    cards = [{"name": "small", "parameters": 1}, {"name": "large", "parameters": 5},
             {"name": "busy", "parameters": 2}]  # fmt: skip
    jobs = [Job(name, "d", seed, 50, True)
            for name, seeds in (("small", 1), ("large", 1), ("busy", 3))
            for seed in range(seeds)]  # fmt: skip
    assert costly_first(jobs, cards) == ["busy", "large", "small"]


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.usefixtures("processes")
def test_rerun_makes_rows_anew_where_it_is_asked_to(stubs: Stubs, jobs: str) -> None:
    part = ("--defences", "cure", "nothing", "--jobs", jobs)
    assert stubs.run(*part, "--seeds", "0", "1") == 0
    before, calls = stubs.rows(), len(stubs.calls)
    stubs.add("cure", nothing)
    assert stubs.run(*part, "--models", "patched", "--rerun", "cure") == 0
    assert stubs.calls[calls:] == [("cure", 0)]
    after = stubs.rows()
    assert after["patched", "cure", 0, False].der == 0.5
    lost = {("patched", "cure", 0, True)}  # its candidates are no longer the defence's
    assert before.keys() - after.keys() == lost
    assert all(after[key] == before[key] for key in after if key != ("patched", "cure", 0, False))
    assert stubs.run(*part, "--seeds", "0", "1") == 0
    assert len(stubs.calls) == calls + 1


def test_rerun_picks_anew(stubs: Stubs) -> None:
    options = ("--models", "patched", "--defences", "cure")
    assert stubs.run(*options, "--oracle-images", "30") == 0
    assert stubs.run(*options, "--rerun", "all") == 0
    assert len(stubs.calls) == 2
    assert stubs.rows()["patched", "cure", 0, True].oracle_images == 100


def test_only_what_the_call_runs_can_be_rerun(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--defences", "nothing", "--rerun", "cure") == 2
    assert "unknown defence cure; there are: nothing" in capsys.readouterr().err


def test_a_line_cut_off_is_run_again(stubs: Stubs, capsys: pytest.CaptureFixture[str]) -> None:
    stubs.run("--defences", "nothing")
    content = stubs.out.read_bytes()
    stubs.out.write_bytes(content[:-20])
    assert stubs.run("--defences", "nothing", "--summary-only") == 0
    assert stubs.out.read_bytes() == content[:-20]
    assert stubs.run("--defences", "nothing") == 0
    assert "cut off" in capsys.readouterr().err
    assert len(stubs.calls) == 3
    assert len(stubs.rows()) == len(stubs.out.read_text().splitlines()) == 2


def test_a_line_that_is_no_row_is_named(stubs: Stubs, capsys: pytest.CaptureFixture[str]) -> None:
    append_rows(stubs.out, [row()])
    with stubs.out.open("a") as file:
        file.write('{"model": "other"}\n')
    assert stubs.run() == 2
    assert "line 2: not a row" in capsys.readouterr().err
    assert stubs.calls == []


def test_interrupt_keeps_what_is_done(stubs: Stubs, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_model: Reader, _clean: ImageSet, _info: Info) -> nn.Module:
        raise KeyboardInterrupt

    stubs.only(nothing=nothing, slow=interrupt)
    assert stubs.run("--models", "patched") == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(stubs.rows()) == [("patched", "nothing", 0, False)]


def test_rows_of_another_protocol_are_not_mixed(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--models", "patched", "--defences", "nothing") == 0
    assert stubs.run("--defences", "nothing", "--test-images", "120") == 2
    assert "test images of shapes, not 120" in capsys.readouterr().err
    assert stubs.run("--defences", "nothing", "--clean-samples", "60") == 2
    assert "[50] clean images" in capsys.readouterr().err


@pytest.mark.parametrize("told", [True, False], ids=["fingerprint", "number alone"])
def test_rows_of_other_test_images_of_the_same_number_are_not_mixed(
    stubs: Stubs, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--models", "patched", "--defences", "nothing") == 0
    (made,) = stubs.rows().values()
    append_rows(stubs.out, [replace(made, test_data="bbbbbbbbbbbb" if told else None)])
    assert stubs.run("--defences", "nothing") == (2 if told else 0)
    assert ("100 (bbbbbbbbbbbb) test images of shapes" in capsys.readouterr().err) == told


def test_rows_of_other_weights_count_as_absent(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--defences", "cure") == 0
    stubs.zoo[0].digest = "bbbbbbbbbbbb"
    capsys.readouterr()
    assert stubs.run("--defences", "cure", "--summary-only") == 0
    captured = capsys.readouterr()
    assert f"2 rows of {stubs.out} are of other weights" in captured.err
    assert "| cure † | 1 | 1/2 |" in captured.out
    assert "| cure † | 1 | 1/2 |" in stubs.out.with_suffix(".md").read_text()
    assert stubs.run("--defences", "cure") == 0
    assert len(stubs.calls) == 3
    weights = {(name, oracle): made.weights for (name, _, _, oracle), made in stubs.rows().items()}
    assert weights == {
        ("patched", False): "bbbbbbbbbbbb",
        ("patched", True): "bbbbbbbbbbbb",
        ("twin", False): "aaaaaaaaaaaa",
    }
    assert stubs.run("--defences", "cure") == 0
    assert len(stubs.calls) == 3


def test_rows_that_do_not_tell_their_weights_are_taken(stubs: Stubs) -> None:
    assert stubs.run("--models", "patched", "--defences", "nothing") == 0
    (made,) = stubs.rows().values()
    older = asdict(made)
    del older["weights"], older["test_data"]
    stubs.out.write_text(json.dumps(older) + "\n")
    assert stubs.run("--models", "patched", "--defences", "nothing") == 0
    assert len(stubs.calls) == 1
    assert "| nothing † | 1 | 1/2 |" in stubs.out.with_suffix(".md").read_text()


def test_digest_is_of_weights_and_trigger(tmp_path: Path) -> None:
    recipe = next(found for found in recipes("smoke") if found.attack != "clean")
    save(tmp_path, recipe, recipe.network(), make_attack(recipe), {"fair": True})
    weights, trigger = (tmp_path / f"{recipe.name}{kind}.safetensors" for kind in ("", ".trigger"))

    def digest() -> str:
        return StoredModel(recipe, {}, tmp_path).digest

    trigger.unlink(missing_ok=True)
    alone = digest()
    assert len(alone) == 12
    assert alone == digest()
    trigger.write_bytes(b"a trigger")
    with_trigger = digest()
    trigger.unlink()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert len({alone, with_trigger, digest()}) == 3


def test_a_card_that_does_not_tell_its_trigger_is_not_done(tmp_path: Path) -> None:
    for recipe in recipes("smoke"):
        card = {"training": asdict(recipe.training), "retrained": recipe.retrained}
        path = tmp_path / f"{recipe.name}.json"
        path.write_text(json.dumps(card))
        assert (read_card(tmp_path, recipe) is None) == (recipe.attack != "clean")
        path.write_text(json.dumps(card | {"trigger_fingerprint": [0.5]}))
        assert read_card(tmp_path, recipe) is not None


def test_another_number_of_clean_images_has_a_file_of_its_own() -> None:
    assert default_out("core", 500).name == "scoreboard_core.jsonl"
    assert default_out("core", 100).name == "scoreboard_core_100clean.jsonl"


# ---- oracle ------------------------------------------------------------------------------------


def test_oracle_row_is_marked_and_left_out_of_the_means(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--models", "patched", "--defences", "cure", "--json") == 0
    own, oracle = (stubs.rows()["patched", "cure", 0, marked] for marked in (False, True))
    assert (own.der, oracle.der) == (0.95, 1.0)
    assert oracle.settings["pick"] == "all"
    sweep = {name: tuple(scores) for name, *scores in oracle.settings["sweep"]}
    assert sweep["all"] == (1.0, 0.0)
    assert sweep["the defence's own"] == (0.9, 0.0)
    assert (own.oracle_images, oracle.oracle_images) == (None, 100)
    assert (oracle.seconds, oracle.image_forwards) == (own.seconds, own.image_forwards)
    assert oracle.cpu_seconds == own.cpu_seconds
    assert (oracle.verdict, oracle.pruned) == (None, None)
    summary = json.loads(capsys.readouterr().out)
    found = {a["defence"]: a for a in summary["defences"]}
    assert found["cure"]["measures"]["der"]["mean"] == 0.95
    assert found["cure"]["scored"] == 1
    assert [a["measures"]["der"]["mean"] for a in summary["oracle"]] == [1.0]
    assert not any(r["oracle"] for r in summary["models"]["patched"])


def test_the_search_that_is_told_the_trigger_is_a_ceiling(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Attack] = []

    def known(
        model: Reader, _clean: ImageSet, *, attack: Attack, seed: int, ledger: Ledger
    ) -> tuple[nn.Module, Info]:
        assert seed == 0
        told.append(attack)
        ledger.count(7)
        model.moved, model.confused = set(), {5}
        return model, Info("told", {"pruned": 1})

    monkeypatch.setattr("bench.scoreboard.run.TOLD", {KNOWN_TRIGGER: known})
    options = ("--defences", "nothing", KNOWN_TRIGGER, "--json")
    assert stubs.run(*options) == 0
    assert [attack.name for attack in told] == ["badnets"]  # not on the twin
    ceiling = stubs.rows()["patched", KNOWN_TRIGGER, 0, True]
    assert (ceiling.der, ceiling.image_forwards, ceiling.pruned) == (0.95, 7, 1)
    assert ("patched", KNOWN_TRIGGER, 0, False) not in stubs.rows()
    summary = json.loads(capsys.readouterr().out)
    nothing = next(a for a in summary["defences"] if a["defence"] == "nothing")
    assert nothing["behind"] == pytest.approx(0.95 - 0.5)
    assert [a["defence"] for a in summary["oracle"]] == [KNOWN_TRIGGER]
    assert "| patched | 100.0 / 100.0 | 11.1 | 90.0 / 0.0 | 100.0 / 100.0 |" in (
        stubs.out.with_suffix(".md").read_text()
    )
    assert stubs.run(*options) == 0
    assert len(told) == 1
    assert stubs.run("--defences", "all") == 1  # one of the stubs fails; all is all defences
    assert len(told) == 1


def test_oracle_can_come_later_and_by_fewer_images(stubs: Stubs) -> None:
    options = ("--models", "patched", "--defences", "cure")
    assert stubs.run(*options, "--no-oracle") == 0
    assert list(stubs.rows()) == [("patched", "cure", 0, False)]
    assert stubs.run(*options, "--oracle-images", "30") == 0
    own, oracle = (stubs.rows()["patched", "cure", 0, marked] for marked in (False, True))
    assert len(stubs.out.read_text().splitlines()) == 3
    assert (own.seconds, own.cpu_seconds) == (oracle.seconds, oracle.cpu_seconds)  # of one run
    assert oracle.settings["pick"] == "all"
    assert (oracle.ca_after, oracle.test_images, oracle.oracle_images) == (1.0, 100, 30)
    assert stubs.run(*options) == 0
    assert len(stubs.calls) == 2


def test_what_the_defence_chose_is_a_candidate(stubs: Stubs) -> None:
    def refine(model: Reader, _clean: ImageSet, info: Info) -> nn.Module:
        before = deepcopy(model)
        info.candidates = [("none", lambda: before), ("half", lambda: Reader(range(5)))]
        return Reader()

    stubs.only(refine=refine)
    assert stubs.run("--models", "patched") == 0
    own, oracle = (stubs.rows()["patched", "refine", 0, marked] for marked in (False, True))
    assert oracle.settings["pick"] == "the defence's own"
    assert oracle.der == own.der == 1.0
    assert own.candidates == 2


def test_nothing_to_pick_from_any_more_settles_the_oracle(stubs: Stubs) -> None:
    options = ("--models", "patched", "--defences", "cure")
    assert stubs.run(*options, "--no-oracle") == 0
    stubs.add("cure", nothing)
    assert stubs.run(*options) == 0
    (made,) = stubs.rows().values()
    assert (made.oracle, made.candidates, made.der) == (False, 0, 0.5)
    assert stubs.run(*options) == 0
    assert len(stubs.calls) == 2


def test_a_run_for_the_oracle_that_fails_leaves_the_row_that_is_there(stubs: Stubs) -> None:
    options = ("--models", "patched", "--defences", "cure")
    assert stubs.run(*options, "--no-oracle") == 0
    first = stubs.rows()["patched", "cure", 0, False]
    cured, fail = stubs.defences["cure"], stubs.defences["fail"]
    stubs.defences["cure"] = fail
    assert stubs.run(*options) == 1
    assert stubs.rows()["patched", "cure", 0, False] == first
    assert "two lines" in str(stubs.rows()["patched", "cure", 0, True].error)
    stubs.defences["cure"] = cured
    assert stubs.run(*options, "--retry-errors") == 0
    own, oracle = (stubs.rows()["patched", "cure", 0, marked] for marked in (False, True))
    assert (own.error, oracle.error) == (None, None)
    assert own.seconds == oracle.seconds


def test_a_candidate_that_fails_fails_the_oracle_alone(stubs: Stubs) -> None:
    def build() -> nn.Module:
        raise RuntimeError("no such threshold")

    def sweep(model: Reader, _clean: ImageSet, info: Info) -> nn.Module:
        info.candidates = [("t", build)]
        return model

    stubs.only(sweep=sweep)
    assert stubs.run("--models", "patched") == 1
    rows = stubs.rows()
    assert rows["patched", "sweep", 0, False].error is None
    oracle = rows["patched", "sweep", 0, True]
    assert "no such threshold" in str(oracle.error)
    assert oracle.ca_after is None


# ---- what goes wrong ---------------------------------------------------------------------------


def test_not_applicable(stubs: Stubs, capsys: pytest.CaptureFixture[str]) -> None:
    assert stubs.run("--models", "patched", "--defences", "refuse") == 0
    made = stubs.rows()["patched", "refuse", 0, False]
    assert (made.applicable, made.reason, made.error) == (False, "no batch norm", None)
    assert (made.ca_after, made.der, made.seconds) == (None, None, None)
    assert "| n/a |" in capsys.readouterr().out
    assert stubs.run("--models", "patched", "--defences", "refuse") == 0
    assert len(stubs.calls) == 1


def test_failing_defence_does_not_stop_the_others(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--models", "patched", "--defences", "fail", "nothing") == 1
    rows = stubs.rows()
    assert rows["patched", "nothing", 0, False].der == 0.5
    failed = rows["patched", "fail", 0, False]
    assert str(failed.error).startswith("ValueError: two lines (test_scoreboard.py:")
    assert (failed.applicable, failed.ca_after) == (True, None)
    captured = capsys.readouterr()
    assert "FAILED: ValueError: two lines" in captured.err
    assert "errors in rows of fail" in captured.err
    assert "fail †" in captured.out


def test_errors_stay_until_they_are_tried_again(stubs: Stubs) -> None:
    options = ("--models", "patched", "--defences", "fail")
    assert stubs.run(*options) == 1
    assert stubs.run(*options) == 1
    assert len(stubs.calls) == 1
    stubs.add("fail", nothing)
    assert stubs.run(*options, "--retry-errors") == 0
    assert stubs.rows()["patched", "fail", 0, False].error is None
    assert stubs.run(*options) == 0


def test_a_repair_without_finite_logits_is_an_error(stubs: Stubs) -> None:
    class Wrecked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), CLASSES), torch.nan)

    def wreck(_model: Reader, _clean: ImageSet, _info: Info) -> nn.Module:
        return Wrecked()

    stubs.only(wreck=wreck)
    assert stubs.run("--models", "patched") == 1
    assert "not finite" in str(stubs.rows()["patched", "wreck", 0, False].error)


def test_network_that_cannot_be_scored_is_passed_over(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.zoo.insert(0, subject("lost", Reader(), dataset="none"))
    assert stubs.run("--defences", "nothing") == 1
    assert "lost: clean data not found" in capsys.readouterr().err
    assert {name for name, *_ in stubs.rows()} == {"patched", "twin"}


def test_unfair_networks_are_listed_and_left_out(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--defences", "nothing") == 0
    captured = capsys.readouterr()
    assert "left out: faint: ASR below 90%" in captured.err
    assert "- faint: ASR below 90%\n- untrained: not trained" in captured.out
    assert {name for name, *_ in stubs.rows()} == {"patched", "twin"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--defences", "cura"), "unknown defence cura; there are: cure, nothing, refuse, fail"),
        (("--models", "x"), "unknown network x; there are: patched, twin, faint"),
    ],
    ids=["defence", "network"],
)
def test_unknown_names(
    stubs: Stubs, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run(*options) == 2
    assert capsys.readouterr().err == f"scoreboard: {message}\n"


def test_too_few_clean_images_is_a_wrong_call(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run("--defences", "nothing", "--clean-samples", "999") == 2
    assert "asked for 999 clean images" in capsys.readouterr().err


# ---- summary -----------------------------------------------------------------------------------


def test_aggregates_by_hand() -> None:
    rows = [
        row("a"),
        row("b", ca_after=0.9, asr_after=0.055, excess_asr=0.005, ra_after=0.8, der=0.9725,
            der_shortfall=0.0275, seconds=20.0, image_forwards=300, peak_memory_mb=100.0),
        row("c", ca_after=0.87, asr_after=0.09, excess_asr=0.04, ra_after=0.75, der=0.94,
            der_shortfall=0.06, seconds=30.0),
        row("t", attack="clean", ca_after=0.88, asr_before=None, asr_after=None, der=None,
            excess_asr=None, ra_after=None, der_shortfall=None, seconds=40.0),
        row("u", attack="clean", ca_after=0.91, asr_before=None, asr_after=None, der=None,
            excess_asr=None, ra_after=None, der_shortfall=None, seconds=None),
        row("v", ca_after=None, asr_after=None, error="ValueError"),
        row("w", ca_after=None, asr_after=None, applicable=False, reason="no norm"),
    ]  # fmt: skip
    found = aggregate("d", rows, networks=7)
    assert (found.scored, found.backdoored, found.clean) == (5, 3, 2)
    assert (found.errors, found.not_applicable, found.complete) == (1, 1, False)
    expected = {
        "ca_drop": (0.13 / 3, 0.03, 0.1),
        "asr_after": (0.345 / 3, 0.09, 0.2),
        "excess_asr": (0.195 / 3, 0.04, 0.15),
        "ra_after": (0.75, 0.75, 0.7),
        "der": (2.7625 / 3, 0.94, 0.85),
        "der_shortfall": (0.2375 / 3, 0.06, 0.15),
    }
    for name, (mean, median, worst) in expected.items():
        spread = found.measures[name]
        assert spread is not None
        assert (spread.mean, spread.median, spread.worst) == pytest.approx((mean, median, worst))
        assert spread.seed_std is None
    assert found.repaired == pytest.approx(2 / 3)
    assert found.traceless == pytest.approx(1 / 3)
    assert found.clean_drop_mean == pytest.approx(0.005)
    assert found.clean_drop_max == pytest.approx(0.02)
    assert (found.seconds, found.cpu_seconds) == (25.0, 15.0)
    assert found.image_forwards == pytest.approx(140)
    assert found.peak_memory_mb == 200.0


def test_no_rows_have_no_means() -> None:
    found = aggregate("d", [], networks=2)
    assert set(found.measures.values()) == {None}
    assert (found.repaired, found.traceless, found.clean_drop_max, found.seconds) == (None,) * 4


def test_spread_over_seeds() -> None:
    rows = [row(m, seed=s, asr_after=a) for m, s, a in
            [("a", 0, 0.0), ("b", 0, 0.2), ("a", 1, 0.2), ("b", 1, 0.4)]]  # fmt: skip
    found = aggregate("d", rows, networks=2)
    assert (found.seeds, found.expected, found.complete) == (2, 4, True)
    spread = found.measures["asr_after"]
    assert spread is not None
    assert spread.mean == pytest.approx(0.2)
    assert spread.seed_std == pytest.approx(math.sqrt(0.02))  # of the means .1 and .3


def test_summary_orders_marks_and_groups() -> None:
    cards = [card("a"), card("b", arch="other"), card("t", attack="clean")]
    rows = [
        row("a", "good", der_shortfall=0.01),
        row("b", "good", arch="other", der_shortfall=0.03),
        row("t", "good", attack="clean", asr_after=None, asr_before=None, der_shortfall=None),
        row("a", "bad", der_shortfall=0.3),
        row("a", "good", oracle=True, der_shortfall=0.0),
    ]
    summary = summarise(rows, cards, [0], ["arch", "attack"])
    assert [a.defence for a in summary.defences] == [NO_DEFENCE, "good", "bad"]
    none, good, bad = summary.defences
    assert none.measures["asr_after"] is not None
    assert none.measures["asr_after"].mean == 1.0
    assert none.measures["der"] is not None
    assert none.measures["der"].mean == 0.5
    assert none.clean_drop_max == 0.0
    assert (good.complete, bad.complete, bad.expected) == (True, False, 3)
    assert [(a.defence, a.expected, a.complete) for a in summary.oracle] == [("good", 2, False)]
    assert list(summary.groups["arch"]) == ["reader", "other"]
    assert [a.complete for a in summary.groups["arch"]["other"]] == [True, True]
    assert [a.defence for a in summary.groups["attack"]["clean"]] == [NO_DEFENCE, "good"]
    text = main_table(summary.defences)
    assert "| good | 1 | 3/3 |" in text
    assert "| bad † | 1 | 1/3 |" in text


def test_report_is_written_beside_the_rows(
    stubs: Stubs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert stubs.run("--defences", "cure", "nothing", "--seeds", "0", "1", "--by", "attack") == 0
    captured = capsys.readouterr()
    text = stubs.out.with_suffix(".md").read_text()
    assert captured.out == text
    assert "no figures" in captured.err
    assert "about 0 s left" in captured.err
    assert "--data DATA" in text
    assert f"- torch: {torch.__version__}" in text
    assert "### attack: badnets" in text
    assert "### Standard deviation of the means of single seeds" in text
    assert "### Oracle" in text
    assert "| patched | 100.0 / 100.0 | 11.1 | – | 90.0 / 0.0 | 100.0 / 100.0 |" in text
    assert "| twin | 100.0 | – | – | 90.0 | 100.0 |" in text
    stubs.out.with_suffix(".md").unlink()
    stubs.zoo.pop()
    assert stubs.run("--seeds", "0", "1", "--summary-only") == 0
    assert stubs.out.with_suffix(".md").exists()
    assert len(stubs.calls) == 8


@pytest.mark.parametrize(
    ("part", "printed"),
    [
        (("--models", "patched"), "| cure | 2 | 2/2 |"),
        (("--defences", "cure"), "| cure | 2 | 4/4 |"),
        (("--seeds", "1"), "| cure | 1 | 2/2 |"),
    ],
    ids=["networks", "defences", "seeds"],
)
@pytest.mark.parametrize("last", [(), ("--summary-only",)], ids=["run", "summary"])
def test_a_part_is_printed_and_the_whole_is_written(
    stubs: Stubs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    part: tuple[str, ...],
    printed: str,
    last: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    stubs.only(cure=cure, nothing=nothing)
    assert stubs.run("--seeds", "0", "1") == 0
    written = stubs.out.with_suffix(".md")
    whole = written.read_bytes()
    written.unlink()
    capsys.readouterr()
    assert stubs.run("--seeds", "0", "1", *part, *last) == 0
    assert printed in capsys.readouterr().out
    assert written.read_bytes() == whole


def test_rows_of_what_is_not_there_stay_out_of_reports(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    append_rows(stubs.out, [row("gone", "nothing"), row("faint", "nothing"), row("twin", "old")])
    before = stubs.out.read_bytes()
    assert stubs.run("--summary-only", "--clean-samples", "500") == 0
    captured = capsys.readouterr()
    assert "not in the report: 3 rows of faint, gone, old" in captured.err
    assert not stubs.out.with_suffix(".md").exists()
    stubs.out.write_bytes(before.replace(b": 500", b": 50"))
    assert stubs.run("--defences", "nothing", "--models", "twin") == 0
    for text in (capsys.readouterr().out, stubs.out.with_suffix(".md").read_text()):
        assert "gone" not in text
        assert "| old" not in text
        assert "| faint" not in text


def test_commands_are_those_of_the_rows() -> None:
    rows = [
        row("a", "x", 0, jobs=2, candidates=3),
        row("a", "x", 0, oracle=True, oracle_images=30),
        row("b", "x", 0, oracle=True, oracle_images=20),
        row("b", "x", 0, oracle=True, oracle_images=10, test_images=10),  # all that there are
        row("a", "y", 0, test_images=80), row("a", "y", 2), row("c", "y", 2),
        row("b", "z", 0), row("a", "z", 0, attack="clean", candidates=2),
        row("b", "w", 2), row("b", "w", 0, candidates=2),
    ]  # fmt: skip
    head = "python -m bench.scoreboard --set core --data DATA --defences"
    assert commands("core", ["a", "b"], rows, ["--by", "arch"]) == [
        f"{head} x z --seeds 0 --clean-samples 500 --test-images 100 --oracle-images 20 --jobs 2 "
        "--by arch",
        f"{head} w y --seeds 0 2 --clean-samples 500 --test-images 100 --no-oracle --by arch",
    ]
    assert commands("core", ["a", "b"], rows[-1:]) == [
        f"{head} w --models b --seeds 0 --clean-samples 500 --test-images 100 --no-oracle"
    ]
    assert commands("core", ["a"], []) == []
    assert "- oracle images: 30, 20, 10" in environment(rows)
    assert "- commit: –" in environment(rows)


def test_the_reports_commands_give_its_rows(
    stubs: Stubs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    public = tmp_path / "results.csv"
    public.write_text("dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr\n")
    assert stubs.run("--defences", "cure", "--oracle-images", "30", "--seeds", "0", "1") == 0
    capsys.readouterr()
    options = ("--defences", "nothing", "--by", "arch", "--leaderboard", str(public))
    assert stubs.run(*options) == 0
    printed, written = (
        [line for line in text.splitlines() if line.startswith("`")]
        for text in (capsys.readouterr().out, stubs.out.with_suffix(".md").read_text())
    )
    head, tail = "`python -m bench.scoreboard --set core --data DATA --defences", (
        "--out rows.jsonl --leaderboard results.csv --by arch`"
    )  # fmt: skip
    size = "--clean-samples 50 --test-images 100"
    assert printed == [f"{head} nothing --seeds 0 {size} {tail}"]
    assert written == [
        *printed,
        f"{head} cure --seeds 0 1 {size} --oracle-images 30 {tail}",
    ]


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("a", "x"), row("b", "x", asr_after=0.0), row("a", "y"), row("a", "y", oracle=True),
            row("t", "x", attack="clean", asr_after=None)]  # fmt: skip
    points = tradeoff_points(rows)
    assert {name: len(of_defence) for name, of_defence in points.items()} == {"x": 2, "y": 1}
    assert points["y"] == [pytest.approx((10.0, 20.0))]
    found = summarise(rows, [card("a"), card("b"), card("t", "clean")], [0], []).defences
    assert cost_points(found) == {
        "x": pytest.approx((15.0, 15.0)),
        "y": pytest.approx((15.0, 15.0)),
    }

    drawn: list[str] = []
    axes = SimpleNamespace(
        **dict.fromkeys(("set_xlabel", "set_ylabel", "set_xscale", "set_ylim", "margins", "grid",
                         "legend"),
                        lambda *_, **__: None),
        scatter=lambda x, y, **_: drawn.append(f"{len(x)} points"),
        annotate=lambda text, *_, **__: drawn.append(text),
    )  # fmt: skip
    figure = SimpleNamespace(
        add_subplot=lambda: axes, savefig=lambda path, **_: path.write_text("<svg/>")
    )
    library = SimpleNamespace(rc_context=nullcontext)
    library.figure = SimpleNamespace(Figure=lambda **_: figure)
    monkeypatch.setitem(sys.modules, "matplotlib", library)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", library.figure)
    paths = draw_figures(tmp_path / "board.jsonl", rows, found)
    assert [path.name for path in paths] == ["board_tradeoff.svg", "board_cost.svg"]
    assert all(path.read_text() == "<svg/>" for path in paths)
    assert drawn == ["2 points", "1 points", "1 points", "x", "1 points", "y"]


# ---- the rest ----------------------------------------------------------------------------------


def test_leaderboard_means(
    tmp_path: Path, stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        ",dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra",
        "0,shapes,preactresnet18,badnet,no defense,0.1,0.90,1.0,0.0",
        "1,shapes,preactresnet18,badnet,clp,0.1,0.80,0.2,0.7",
        "2,shapes,preactresnet18,wanet,no defense,0.1,0.92,0.9,0.0",
        "3,shapes,preactresnet18,wanet,clp,0.1,0.93,0.0,0.9",
        "4,shapes,preactresnet18,wanet,dde,0.1,-1.0,-1.0,-1.0",
        "5,shapes,preactresnet18,lira,no defense,0.1,0.6,0.3,0.0",
        "6,shapes,preactresnet18,lira,clp,0.1,0.1,0.9,0.0",
        "7,shapes,preactresnet18,sig,no defense,0.1,,,",
        "8,shapes,preactresnet18,sig,clp,0.1,0.1,0.9,0.0",
        "9,shapes,vgg19_bn,badnet,no defense,0.1,0.9,1.0,0.0",
        "10,shapes,vgg19_bn,badnet,ft,0.1,0.9,1.0,0.0",
    ]
    path = tmp_path / "results.csv"
    path.write_text("\n".join(lines) + "\n")
    (clp,) = public_means(path, "shapes", "preactresnet18")
    assert (clp.defence, clp.cases) == ("CLP", 2)
    assert clp.ca_drop == pytest.approx((0.10 - 0.01) / 2)
    assert clp.asr_after == pytest.approx(0.1)
    assert clp.der == pytest.approx(((0.8 - 0.1 + 1) / 2 + (0.9 + 1) / 2) / 2)
    assert clp.repaired == 0.5
    assert stubs.run("--defences", "nothing", "--leaderboard", str(path)) == 0
    text = capsys.readouterr().out
    assert "context, not a comparison" in text
    assert "| CLP | 2 | 4.5 | 10.0 | 90.0 | 50 |" in text


def test_leaderboard_of_another_form(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BadData, match="no columns attack_name"):
        public_means(path, "cifar10", "preactresnet18")
    with pytest.raises(UsageError, match=r"cannot read .*none\.csv"):
        public_means(tmp_path / "none.csv", "cifar10", "preactresnet18")


def test_rows_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    first, second = row("a", settings={"u": [3, 4]}), row("b", error="it is\nover")
    append_rows(path, [first])
    append_rows(path, [second, replace(first, der=0.1)])
    assert list(read_rows(path).values()) == [replace(first, der=0.1), second]
    assert read_rows(tmp_path / "none.jsonl") == {}


def test_settings_become_strict_json() -> None:
    settings = {1: torch.tensor([1.0, torch.inf]), "p": Path("x"), "s": (1, None), "t": True}
    assert plain(settings) == {"1": [1.0, "inf"], "p": "x", "s": [1, None], "t": True}


def test_peak_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(memory, "_STATUS", status)
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "clear_refs")
    status.write_text("VmHWM:\t    1000 kB\nVmRSS:\t    1000 kB\n")
    peak = PeakMemory()
    assert (tmp_path / "clear_refs").read_text() == "5"
    status.write_text("VmHWM:\t   50000 kB\nVmRSS:\t    1000 kB\n")
    assert peak.megabytes() == 51.2
    assert PeakMemory().megabytes() is None  # the reset did nothing
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path)
    assert PeakMemory().megabytes() is None  # and here it is refused
    status.unlink()
    assert peak.megabytes() is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.3, "12 s"), (600, "10 min"), (9000, "2 h 30 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
