"""The whole path on real networks: the demo's backdoored one and its clean twin."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import onp
from onp import demo
from onp.agent.policy import PruningPolicy
from onp.agent.weights import save_policy
from onp.clean import Clean
from onp.config import BUDGETS, AgentConfig, SearchPrecision, SynthesisConfig, UnlearningConfig
from onp.data import PRESETS, ImageSet, Normalize
from onp.errors import BadData, UnsafeOrCorruptModel, UntraceableModel, UsageError
from onp.features import NAMES
from onp.ledger import Ledger
from onp.metrics import predict
from onp.prepare import bare, baseline, check_normalisation, frozen_copy
from onp.result import Result
from onp.suspect.load import load_suspect
from onp.triggers import load_trigger
from onp.verdict import Verdict
from tests.networks import all_to_all, dim_images, led_away, network

CLEAN_TWIN = Path(__file__).parent / "data" / "demo_clean.safetensors"


def suspect() -> nn.Module:
    return load_suspect(demo.CHECKPOINT, demo.ARCH).model


def clean_twin() -> nn.Module:
    return load_suspect(CLEAN_TWIN, demo.ARCH).model


@pytest.fixture(scope="module")
def test_set() -> ImageSet:
    return demo.scoring_images()


@pytest.fixture(scope="module")
def repaired() -> Result:
    return onp.sanitize(suspect(), demo.clean_images(), seed=0)


def test_the_backdoor_goes_and_the_accuracy_stays(repaired: Result, test_set: ImageSet) -> None:
    trigger = load_trigger(str(demo.TRIGGER))
    before = onp.score(suspect(), test_set, trigger, demo.TARGET)
    after = onp.score(repaired.model, test_set, trigger, demo.TARGET)
    assert before["attack_success_rate"] > 0.95
    assert after["attack_success_rate"] < 0.08
    assert after["clean_accuracy"] > before["clean_accuracy"] - 0.05
    assert repaired.verdict == "backdoor"
    assert repaired.report["target_classes"] == [demo.TARGET]


@pytest.mark.parametrize(
    ("precision", "confirmed"), [("int8", True), ("int8", False), ("bf16", True)]
)
def test_a_search_in_less_than_fp32_repairs_and_goes_on_in_fp32_where_that_does_not_confirm_it(
    precision: SearchPrecision,
    confirmed: bool,
    test_set: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onp.ops.masked_forward.bytes_pay", lambda: True)
    monkeypatch.setattr("onp.ops.masked_forward.halves_pay", lambda: True)
    monkeypatch.setattr("onp.search.CONFIRMED", 0.05 if confirmed else -1.0)
    budget = replace(BUDGETS["quick"], search_precision=precision)
    result = onp.sanitize(suspect(), demo.clean_images(), seed=0, budget=budget)
    assert result.report["precision"] == (precision if confirmed else "fp32")
    after = onp.score(result.model, test_set, load_trigger(str(demo.TRIGGER)), demo.TARGET)
    assert after["attack_success_rate"] < 0.2


def test_a_policy_proposes_the_gates(tmp_path: Path) -> None:
    """One that was taught nothing: a repair asks it, and takes its own few steps from there."""
    save_policy(PruningPolicy(len(NAMES), 3, rounds=1, seed=0), tmp_path / "p.safetensors")
    quick = BUDGETS["quick"]
    gates = replace(quick.gates, policy=str(tmp_path / "p.safetensors"), seen=32)
    result = onp.sanitize(suspect(), demo.clean_images(), budget=replace(quick, gates=gates))
    assert result.verdict == "backdoor"
    asked = result.report["image_forwards"]["gates"]
    probes = sum(probe["counted"] for probe in result.report["probes"])
    a_step = gates.images_per_step + probes * -(-gates.images_per_step // probes)
    assert asked == 4 * 32 + 2 * gates.adapted_steps * a_step


def test_aftercare_comes_after_pruning_and_is_told(test_set: ImageSet) -> None:
    result = onp.sanitize(
        suspect(), demo.clean_images(), budget="quick", recalibrate=True, finetune=True
    )
    told = result.report["aftercare"]
    assert told["recalibrated"]
    assert told["finetuned"]
    assert told["accuracy"] > 0.9
    # Statistics, the suspect's answers, four epochs on clean and triggered images, accuracy.
    assert result.report["image_forwards"]["aftercare"] == 500 * (1 + 1 + 4 * 6 + 1)
    trigger = load_trigger(str(demo.TRIGGER))
    after = onp.score(result.model, test_set, trigger, demo.TARGET)
    assert after["attack_success_rate"] < 0.02  # tuning does not bring the backdoor back
    images = test_set[torch.arange(64)].floats()
    with torch.no_grad():
        whole, cut = result.model(images), result.compact()(images)
    torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-3)


def test_the_report_says_why(repaired: Result) -> None:
    report = json.loads(json.dumps(repaired.report, allow_nan=False))
    assert report["schema"] == "onp.repair/13"
    assert report["sites"]["pruned"] == int(repaired.mask.sum()) > 0
    pruned = sum(len(layer["pruned"]) for layer in report["layers"])
    assert pruned == report["sites"]["pruned"]
    before, after = (report["choice"][f"probe_success_{when}"] for when in ("before", "after"))
    assert max(after) < 0.3 < min(before)
    turns = [(log["start"], log["draw"]) for log in report["rounds"]]
    assert turns == sorted(turns)
    assert {draw for _, draw in turns} == {0}  # all images are in it
    for turn in set(turns):
        worths = [r["worth"] for r in report["rounds"] if (r["start"], r["draw"]) == turn]
        assert worths == sorted(worths)
    assert all(log["flips"] > 0 for log in report["rounds"])
    assert report["evidence"]["by"] == "norm statistics"
    assert all(probe["worth"] is None and probe["sites"] == 0 for probe in report["probes"])
    assert report["target_classes"] == [demo.TARGET]  # looks call no other beside it
    assert {one["target"] for one in report["looks"]} == set(range(10))
    assert {one["target"] for one in report["squares"]} == set(range(10))
    assert report["margins"] is None
    stages = {"prepare", "statistics", "replay", "respond", "gates", "agent", "renew", "choose"}
    assert stages < set(report["image_forwards"])
    assert stages < set(report["seconds"])
    assert report["image_forwards"]["total"] == sum(
        count for stage, count in report["image_forwards"].items() if stage != "total"
    )


def test_the_compact_network_answers_alike(repaired: Result, test_set: ImageSet) -> None:
    images = test_set.floats()[:64]
    smaller = repaired.compact()
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), repaired.model(images), rtol=0, atol=1e-4)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (smaller, repaired.model)]
    assert sizes[0] < sizes[1]
    assert repaired.report["sites"]["zeroed_in_compact"] <= repaired.report["sites"]["pruned"]


@pytest.mark.gpu
def test_the_whole_path_on_cuda(test_set: ImageSet) -> None:
    result = onp.sanitize(suspect(), demo.clean_images(), seed=0, device="cuda")
    trigger = load_trigger(str(demo.TRIGGER))
    after = onp.score(result.model, test_set, trigger, demo.TARGET)
    assert result.verdict == "backdoor"
    assert result.report["backend"] == "native"
    assert after["attack_success_rate"] < 0.08


@pytest.mark.parametrize(
    ("network", "stage"), [("suspect", "replay"), ("clean", "race")], ids=["norms", "probes"]
)
def test_the_whole_path_keeps_to_one_device(network: str, stage: str) -> None:
    """On a device that refuses the CPU's tensors; in a process of its own, as it has to be
    registered. Either way that a backdoor can be called."""
    command = [sys.executable, "-m", "tests.other_device", "quick", network]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"'{stage}'" in done.stdout


@pytest.mark.parametrize("budget", ["quick", "standard"])
def test_a_clean_network_comes_back_untouched(budget: str) -> None:
    model, clean = clean_twin(), demo.clean_images()
    result = onp.sanitize(model, clean, seed=0, budget=budget)
    assert result.verdict == "clean"
    assert not result.mask.any()
    looked = result.report["looks"]
    assert {look["target"] for look in looked} == set(clean.labels.tolist())
    squares = result.report["squares"]
    assert {square["target"] for square in squares} == set(clean.labels.tolist())
    assert [one["success"] for one in squares] == sorted(
        (one["success"] for one in squares), reverse=True
    )
    margins = result.report["margins"]
    assert {one["target"] for one in margins} == set(clean.labels.tolist())
    assert [one["margin"] for one in margins] == sorted(
        (one["margin"] for one in margins), reverse=True
    )
    assert all(one["natural"] > 0 for one in margins)
    driven = max(one["margin"] for one in margins)
    assert driven > max(one["natural"] for one in margins)  # surer than of any image
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_a_class_that_is_named_is_repaired_whatever_the_evidence_says() -> None:
    model, clean = clean_twin(), demo.clean_images()
    result = onp.sanitize(model, clean, seed=0, budget="quick", target=3)
    report = result.report
    assert result.verdict == "suspected"
    assert (report["told_class"], report["target_classes"]) == (3, [3])
    assert report["score"] < 0.55
    assert report["reason"].endswith("; nothing is called, but class 3 was named as suspect")
    assert {probe["target"] for probe in report["probes"] if probe["counted"]} == {3}
    assert result.mask.any()
    assert report["accuracy"]["after"] > 0.8  # a wrong guess costs some of it


def test_any_module_any_iterable_same_seed_same_bytes_input_unchanged() -> None:
    class Inside(nn.Module):
        """Normalisation inside, half-range inputs."""

        def __init__(self) -> None:
            super().__init__()
            self.normalize = Normalize((-1.0,) * 3, (2.0,) * 3)  # [-1, 1] -> [0, 1]
            self.network = suspect()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(self.normalize(x))  # type: ignore[no-any-return]

    model = Inside().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dataset = demo.clean_images()
    order = dataset.labels.argsort()  # sorted by class, as folders come
    floats = dataset.floats()[order] * 2 - 1
    batches = list(zip(floats.split(64), dataset.labels[order].split(64), strict=True))
    state = torch.random.get_rng_state()
    first, second = (
        onp.sanitize(model, iter(batches), seed=3, budget="quick", input_range=(-1.0, 1.0))
        for _ in range(2)
    )
    assert first.verdict == "backdoor"
    assert torch.equal(first.mask, second.mask)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key])
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not first.model.training


def _images(count: int = 20, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("clean", "error", "message"),
    [
        ([], BadData, "empty"),
        ([(_images(), torch.zeros(20, dtype=torch.int64))], BadData, "all of class 0"),
        ([(_images(), torch.arange(20))], BadData, r"labels must be in 0 \.\. 9"),
        ([(_images() * 9, torch.arange(20) % 10)], BadData, "input range"),
        ([(_images() * torch.nan, torch.arange(20) % 10)], BadData, "NaN"),
        ([(_images(size=6), torch.arange(20) % 10)], BadData, "answers only"),
        ([(_images()[:, :1], torch.arange(20) % 10)], UntraceableModel, "does not accept images"),
        ([(_images(), torch.arange(20) % 10)], BadData, "answers only"),
        ([(_images()[:, 0], torch.arange(20) % 10)], BadData, r"must be \[N, C, H, W\]"),
        (None, BadData, "must be an ImageSet or yield"),
    ],
    ids=["empty", "classes", "labels", "range", "nan", "tiny", "grey", "noise", "flat", "none"],
)
def test_unusable_clean_data_is_refused(
    clean: list[tuple[Tensor, Tensor]], error: type[Exception], message: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        onp.sanitize(suspect(), clean)


def test_the_wrong_normalisation_is_refused_and_the_right_one_named() -> None:
    clean, usual = demo.clean_images(), PRESETS["cifar10"]
    assert usual is not None
    for preset in ("cifar10", "imagenet"):
        with pytest.raises(BadData, match=r"42% .* 100% behind .*'none': take --preset none"):
            onp.sanitize(suspect(), clean, preprocess=PRESETS[preset])
    # A network that wants what the preset gives: it takes that back itself.
    undo = Normalize(
        [-mean / std for mean, std in zip(usual.mean, usual.std, strict=True)],
        [1 / std for std in usual.std],
    )
    wants = nn.Sequential(undo, suspect())
    with pytest.raises(BadData, match="take --preset cifar10"):
        onp.sanitize(wants, clean)
    images, labels = clean.floats()[:64], clean.labels[:64]
    ledger = Ledger()
    for model, preprocess in ((suspect(), None), (wants, usual)):
        whole, device = frozen_copy(model, preprocess, None)
        trace = onp.trace(whole, (3, 32, 32))
        evaluator = onp.MaskEvaluator(trace, whole, device=device, ledger=ledger)
        seen = baseline(whole, evaluator, images, labels, preprocess=preprocess)
        assert float((seen.answers == labels).float().mean()) > 0.9
    assert ledger.forwards["start"] == 2 * (64 + 16)  # who is sure is not asked again
    for count in (12, 64):  # the fewer do not tell enough
        evaluator = onp.MaskEvaluator(onp.trace(wants, (3, 32, 32)), wants, ledger=Ledger())
        seen = Clean.seen_by(evaluator, images[:count], labels[:count])
        with nullcontext() if count == 12 else pytest.raises(BadData, match="cifar10"):
            check_normalisation(wants, None, seen, evaluator.ledger)
        assert evaluator.ledger.total == 3 * count


def test_unusable_options_are_refused() -> None:
    model, clean = suspect(), demo.clean_images()
    with pytest.raises(UsageError, match="budget must be one of quick, standard, thorough"):
        onp.sanitize(model, clean, budget="huge")
    wrong = replace(BUDGETS["quick"], search_precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="search_precision must be one of fp32, bf16, int8"):
        onp.sanitize(model, clean, budget=wrong)
    for wrong_range in ((1.0, 0.0), (-math.inf, 1.0), (0.0, math.inf), (math.nan, 1.0), None, (1,)):
        with pytest.raises(UsageError, match="low < high"):
            onp.sanitize(model, clean, input_range=wrong_range)  # type: ignore[arg-type]
    for target in (-1, 10, 2.5, True):
        with pytest.raises(UsageError, match=f"target {target} is none of .* 0 to 9"):
            onp.sanitize(model, clean, target=target)  # type: ignore[arg-type]
    with pytest.raises(BadData, match="no clean image is of class 9"):
        onp.sanitize(model, clean[clean.labels < 9], target=9)
    for threads in (0, -1, 10**6, 1.5, True):
        with pytest.raises(UsageError, match="threads must be a number from 1 to"):
            onp.sanitize(model, clean, threads=threads)  # type: ignore[arg-type]
    for seed in (-1, 2**63, 1.0, None):
        with pytest.raises(UsageError, match="seed must be a number from 0"):
            onp.sanitize(model, clean, seed=seed)  # type: ignore[arg-type]
    for wrong_budget in (None, 3):
        with pytest.raises(UsageError, match="budget must be one of"):
            onp.sanitize(model, clean, budget=wrong_budget)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="preprocess must be"):
        onp.sanitize(model, clean, preprocess="cifar10")  # type: ignore[arg-type]
    for device in ("meta", "xpu", "abacus"):
        with pytest.raises(UsageError, match=f"device {device} cannot be used"):
            onp.sanitize(model, clean, device=device)
    with pytest.raises(UnsafeOrCorruptModel, match="no parameters"):
        onp.sanitize(nn.Flatten(), clean)
    broken = suspect()
    with torch.no_grad():
        broken.get_submodule("linear").bias[0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(UnsafeOrCorruptModel, match="not finite"):
        onp.sanitize(broken, clean)
    with pytest.raises(UnsafeOrCorruptModel, match="not finite"):
        predict(broken, clean.floats()[:4])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript
def test_what_is_no_network_is_refused() -> None:
    clean = demo.clean_images()
    for wrong in (suspect().state_dict(), "model.pt", suspect):
        with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module"):
            onp.sanitize(wrong, clean)  # type: ignore[arg-type]
    with torch.no_grad():
        compiled = torch.jit.trace(suspect(), clean.floats()[:2])
    with pytest.raises(UsageError, match="TorchScript"):
        onp.sanitize(compiled, clean)
    pruned = suspect()
    prune.l1_unstructured(pruned.get_submodule("linear"), "weight", 2)
    pruned(clean.floats()[:1])  # whose weight then is no leaf any more
    with pytest.raises(UntraceableModel, match=r"take hooks off first, by .*prune\.remove"):
        onp.sanitize(pruned, clean)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_wrappers_that_only_run_a_network_are_taken_off() -> None:
    model = suspect()
    assert bare(nn.DataParallel(model)) is model
    assert bare(torch.compile(model)) is model
    assert bare(model) is model


def test_the_callers_settings_do_not_matter_and_come_back(repaired: Result) -> None:
    before, model, clean = torch.get_num_threads(), suspect(), demo.clean_images()
    torch.set_default_dtype(torch.float64)
    try:
        again = onp.sanitize(model, clean, threads=before)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.mask, repaired.mask)
    assert torch.get_num_threads() == before


def test_a_result_can_be_sent_to_another_process(repaired: Result) -> None:
    sent = pickle.loads(pickle.dumps(repaired))
    images = demo.clean_images().floats()[:8]
    with torch.no_grad():
        assert torch.equal(sent.model(images), repaired.model(images))
        assert torch.equal(sent.compact()(images), repaired.compact()(images))
    assert sent.report == repaired.report


@pytest.mark.parametrize(
    "name",
    [
        "vgg11", "vgg16_bn", "resnet18", "resnet20-option-a", "mobilenetv2", "densenet", "vit",
        "convnext",
    ],
)  # fmt: skip
def test_every_architecture_goes_the_whole_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained networks judged by their own answers, a backdoor taken for granted: the path must
    hold, whatever its outcome."""
    size = (32, 32) if name == "vit" else (64, 64)
    model = network(name, size=size)
    torch.manual_seed(0)
    images = torch.rand(60, 3, *size)
    with torch.no_grad():
        labels = model(images).argmax(1)
    if len(labels.unique()) < 2:  # an untrained network may answer one class
        labels[::2] = (labels[::2] + 1) % 5
    config = replace(
        BUDGETS["quick"],
        unlearning=UnlearningConfig(max_steps=2, gentle_steps=2),
        synthesis=SynthesisConfig(
            steps=4, images_per_step=4, classes=2, looked_at=4, renewal_steps=2
        ),
        agent=AgentConfig(rounds=2, images=8),
    )
    found = Verdict("backdoor", 1.0, int(labels[0]), "probes", {}, "taken for granted")
    monkeypatch.setattr(
        "onp.evidence.looks.by_looks",
        lambda probed, *_: replace(found, target=probed[0].probe.target),
    )
    monkeypatch.setattr(
        "onp.evidence.standing.counted_contenders", lambda contenders, *_: contenders[:2]
    )
    monkeypatch.setattr("onp.evidence.order.from_statistics", lambda *_: None)
    result = onp.sanitize(model, [(images, labels)], budget=config)
    assert result.verdict == "backdoor"
    assert result.report["choice"]["cost"] <= 2.0
    with torch.no_grad():
        assert result.model(images[:2]).isfinite().all()


@pytest.mark.parametrize("budget", ["quick", "standard"])
def test_all_to_all_without_norms(budget: str) -> None:
    """Squares call it, the report says so, and probes are renewed for it like for any other."""
    torch.manual_seed(0)
    images, labels = dim_images(120)
    model = all_to_all(backdoored=True)
    result = onp.sanitize(model, [(images, labels)], seed=0, budget=budget)
    report = json.loads(json.dumps(result.report))
    assert (report["verdict"], report["evidence"]["by"]) == ("backdoor", "squares")
    assert report["target_classes"] == [0, 1, 2]
    assert {row["target"] for row in report["squares"]} == {"label+1", "label+2"}
    assert all(probe["target"] == "label+1" for probe in report["probes"] if probe["counted"])
    assert any(probe["family"] == "square" for probe in report["probes"])
    triggered = images.clone()
    triggered[:, :, 6:, 6:] = 1.0
    with torch.no_grad():
        assert (result.model(images).argmax(1) == labels).all()
        assert (model(triggered).argmax(1) == (labels + 1) % 3).all()
        left = (result.model(triggered).argmax(1) == (labels + 1) % 3).float().mean()
    assert float(left) < 0.4  # one class is answered whatever is shown: a third by chance


def test_a_trigger_that_works_on_one_class_alone() -> None:
    model, images, labels = led_away("one")
    result = onp.sanitize(model, [(images, labels)], budget="quick", finetune=True)
    report = result.report
    assert report["verdict"] == "backdoor"
    assert (report["source_class"], report["target_classes"]) == (3, [1])
    assert {probe["target"] for probe in report["probes"]} == {"3->1"}
    assert report["choice"]["probe_success_before"] == pytest.approx([1.0] * 3, abs=0.1)
    assert max(report["choice"]["probe_success_after"]) < 0.1
    triggered = images.clone()
    triggered[..., 18:, 18:] = 1.0
    hit = labels == 3
    with torch.no_grad():
        assert bool((model(triggered[hit]).argmax(1) == 1).all())
        assert bool((result.model(triggered[hit]).argmax(1) == 3).all())
        assert bool((result.model(images).argmax(1) == labels).all())
    json.dumps(report, allow_nan=False)
