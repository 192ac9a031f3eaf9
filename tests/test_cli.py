"""The command line: what each command prints, writes and returns, and that errors are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import onp
from onp import checkpoint
from onp.__main__ import main
from onp.errors import UntraceableModel
from onp.suspect.files import read_weights, save_weights

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
"""

REPORT = {
    "verdict": "backdoor",
    "reason": "pruning 1 site kills the probe",
    "target_classes": [2],
    "accuracy": {"before": 0.9, "after": 0.875, "images": 8},
    "aftercare": None,
    "sites": {"total": 48, "pruned": 1},
    "layers": [
        {"name": "conv1", "sites": 16, "pruned": []},
        {"name": "1", "sites": 32, "pruned": [5]},
    ],
    "seconds": {"prepare": 0.25, "agent": 1.0, "total": 1.25},
    "image_forwards": {"prepare": 16, "agent": 640, "total": 656},
}


@dataclass
class FakeResult:
    """What onp.sanitize returns, as far as the command line looks at it."""

    model: nn.Module
    report: dict[str, Any] = field(default_factory=lambda: dict(REPORT))

    def compact(self) -> nn.Module:
        return nn.Linear(2, 2)


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    """Arguments of the fakes' calls."""
    return []


@pytest.fixture(autouse=True)
def _workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]
) -> None:
    """A suspect, data and a trigger in the working directory; fakes of what takes long."""
    monkeypatch.chdir(tmp_path)
    Path("cli_networks.py").write_text(FACTORY)
    torch.manual_seed(0)
    save_weights("m.pt", nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).state_dict())
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    np.savez("data.npz", images=images, labels=np.arange(12) % 3)
    np.savez("trigger.npz", alpha=0.2, image=np.ones((4, 4, 3)))

    def repair(model: nn.Module, clean: Any, **options: Any) -> FakeResult:
        calls.append({"clean": clean, **options})
        options["progress"]("probes", 0, 2, "")
        options["progress"]("probes", 1, 2, "")
        options["progress"]("probes", 2, 2, "patch, class 2")
        return FakeResult(model)

    def score(
        model: nn.Module, dataset: Any, trigger: Any, target: int | None, preprocess: Any
    ) -> dict[str, Any]:
        assert not model.training
        calls.append({"dataset": dataset, "preprocess": preprocess})
        scores: dict[str, Any] = {"clean_accuracy": 0.5, "images": len(dataset)}
        if trigger is not None:
            assert trigger(dataset.floats()).shape == dataset.floats().shape
            scores |= {"attack_success_rate": 0.25, "robust_accuracy": None}
            scores |= {"triggered_images": 8, "target": target}
        return scores

    def run(seed: int, device: torch.device, progress: Any) -> dict[str, Any]:
        assert device == torch.device("cpu")
        progress("demo", 1, 1, f"seed {seed}")
        scores = {"clean_accuracy": 0.5, "images": 9}
        return {"report": REPORT, "before": scores, "after": scores}

    for module, functions in {
        "onp.metrics": {"score": score},
        "onp.demo": {"run": run},
    }.items():
        fake = ModuleType(module)
        vars(fake).update(functions)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(checkpoint, "sanitize", repair)


NET = ["--arch", "cli_networks:net", "--trust"]
SANITIZE = ["sanitize", "m.pt", *NET, "--data", "data.npz", "--out", "out.safetensors"]
EVALUATE = ["evaluate", "m.pt", *NET, "--data", "data.npz"]


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a failed command that printed nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("onp: error: ")
    return captured.err


# ---- quick answers


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_quick_options_leave_torch_alone(option: str) -> None:
    code = (
        "import sys\nfrom onp.__main__ import main\n"
        f"code = main([{option!r}])\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'PIL', 'triton'} & sys.modules.keys()\n"
        "sys.exit(code or ', '.join(heavy) or 0)\n"
    )
    path = str(Path(sys.modules["onp"].__file__ or "").parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("sanitize" if option == "--help" else "onp 0.") in done.stdout


@pytest.mark.parametrize("command", ["sanitize", "batch", "evaluate", "demo", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out


# ---- sanitize


def test_sanitize_writes_and_tells(
    capsys: pytest.CaptureFixture[str], calls: list[dict[str, Any]]
) -> None:
    code = main([*SANITIZE, "--report", "r.json", "--clean-samples", "6", "--budget", "quick"])
    captured = capsys.readouterr()
    assert code == 0
    assert "backdoor found and pruned (pruning 1 site kills the probe)" in captured.out
    assert "90.00% -> 87.50% on 8 clean images" in captured.out
    assert "1: 1 of 32" in captured.out
    assert "conv1" not in captured.out
    assert captured.err == "probes 0/2\nprobes 2/2 patch, class 2\n"

    (call,) = calls
    assert len(call["clean"]) == 6
    assert (call["budget"], call["device"], call["seed"]) == ("quick", "cpu", 0)
    assert call["threads"] is call["preprocess"] is None

    repaired = read_weights("out.safetensors")
    report = json.loads(Path("r.json").read_text())
    assert report["suspect"]["sha256"] == read_weights("m.pt").sha256
    assert report["repaired"]["sha256"] == repaired.sha256
    assert report["arch"] == "cli_networks:net"
    assert repaired.state_dict.keys() == read_weights("m.pt").state_dict.keys()


def test_sanitize_json_is_all_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SANITIZE, "--json", "--quiet", "--report", "r.json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out) == json.loads(Path("r.json").read_text())


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SANITIZE, "--json", "--quiet", "--profile"]) == 0
    profile = json.loads(capsys.readouterr().out)["profile"]
    stages = {stage["stage"]: stage for stage in profile["stages"]}
    assert list(stages) == ["import", "read", "prepare", "agent", "write"]
    assert stages["agent"]["image_forwards"] == 640
    assert stages["agent"]["seconds"] == 1.0
    assert stages["read"]["seconds"] > 0
    assert main([*SANITIZE, "--quiet", "--profile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-6:]] == [*stages, "wall"]
    assert lines[-1].endswith("656 image-forwards")
    assert main([*SANITIZE, "--json", "--quiet"]) == 0
    assert "profile" not in json.loads(capsys.readouterr().out)


def test_few_clean_images_are_all_taken(calls: list[dict[str, Any]]) -> None:
    assert main(SANITIZE) == 0
    assert len(calls[0]["clean"]) == 12


@pytest.mark.parametrize(("text", "target"), [("1", 1), ("0", 0)])
def test_a_class_may_be_named(text: str, target: int, calls: list[dict[str, Any]]) -> None:
    assert main([*SANITIZE, "--target", text]) == 0
    assert calls[0]["target"] == target


def test_aftercare_is_asked_for(
    capsys: pytest.CaptureFixture[str],
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"recalibrated": False, "finetuned": True, "accuracy": 0.9}
    monkeypatch.setitem(REPORT, "aftercare", told)
    assert main([*SANITIZE, "--finetune"]) == 0
    assert calls[0]["finetune"]
    assert not calls[0]["recalibrate"]
    assert "finetuned: 90.00% on the same clean images" in capsys.readouterr().out


def test_fail_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*SANITIZE, "--fail-on", "backdoor"]) == 1
    assert Path("out.safetensors").exists()
    report = REPORT | {"verdict": "clean"}
    clean = lambda model, *_, **__: FakeResult(model, report=report)  # noqa: E731
    monkeypatch.setattr(checkpoint, "sanitize", clean)
    assert main([*SANITIZE, "--fail-on", "backdoor"]) == 0


def test_compact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SANITIZE, "--compact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repaired"]["compact"] is True
    assert list(read_weights("out.safetensors").state_dict["weight"].shape) == [2, 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--preset", "cifar10"], (0.4914, 0.4822, 0.4465)),
        (["--mean", ".1,.2,.3", "--std", "1,1,2"], (0.1, 0.2, 0.3)),
        (["--preset", "none"], None),
    ],
)
def test_normalisation(
    options: list[str], expected: tuple[float, ...] | None, calls: list[dict[str, Any]]
) -> None:
    assert main([*SANITIZE, *options]) == 0
    preprocess = calls[0]["preprocess"]
    assert (preprocess and preprocess.mean) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean", "1,2,3"], "--mean and --std go together"),
        (["--mean", "1", "--std", "1", "--preset", "none"], "--preset and --mean exclude"),
        (["--mean", "1,x", "--std", "1,1"], "--mean must be numbers"),
        (["--mean", "1,2", "--std", "1"], "--std must be 2 positive numbers"),
        (["--mean", "1", "--std", "0"], "--std must be 1 positive"),
        (["--out", "out.pt"], "--out must end in .safetensors"),
        (["--out", "nowhere/out.safetensors"], "No such file or directory"),
        (["--out", "folder.safetensors"], "it is a directory"),
        (["--out", "m.pt/out.safetensors"], "Not a directory"),
        (["--report", "nowhere/r.json"], "No such file or directory"),
        (["--report", "m.pt"], "report and model are the same file"),
        (["--report", "./out.safetensors"], "report and out are the same file"),
        (["--budget", "huge"], "'huge' is not one of"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--device", "abacus"], "device abacus cannot be used"),
        (["--device", "meta:1:2"], "device meta:1:2 cannot be used"),
        (["--target", "stop"], "target 'stop' is no class number"),
        (["--target", "-1"], "target '-1' is no class number"),
        (["--frobnicate"], "No such option"),
        (["--arch", "cli_networks:none"], "has no callable none"),
    ],
)
def test_wrong_usage_is_4_before_any_work(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    calls: list[dict[str, Any]],
) -> None:
    Path("folder.safetensors").mkdir()
    assert main([*SANITIZE, *options]) == 4
    assert message in _error(capsys)
    assert calls == []
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["sanitize"], SANITIZE[:5]], ids=str)
def test_incomplete_commands_are_4(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 4
    assert "see onp --help" in _error(capsys)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [(b"", 2, "empty"), (b"\x80\x02junk", 2, "damaged"), (b"\x89PNG", 3, "neither")],
)
def test_unusable_suspects(
    content: bytes, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("m.pt").write_bytes(content)
    assert main(SANITIZE) == code
    assert message in _error(capsys)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UntraceableModel("layer1.gate:\nno rule for it"), 2, "layer1.gate: no rule for it"),
        (MemoryError(), 5, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9"), 5, "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory."), 5, "memory ran out"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_during_the_repair(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "sanitize", fail)
    assert main(SANITIZE) == code
    assert message in _error(capsys)
    assert not Path("out.safetensors").exists()


def test_unforeseen_errors_are_2_with_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(checkpoint, "sanitize", fail)
    assert main(SANITIZE) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("onp: error: internal: ZeroDivisionError: surprise\n")


def test_what_code_of_the_users_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    Path("loud.py").write_text(FACTORY.replace("return", 'print("building"); return'))
    spec = ["--arch", "loud:net", "--trust", "--json"]
    assert main(["sanitize", "m.pt", *SANITIZE[2:], *spec]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "backdoor"
    assert "building" in captured.err


def test_the_data_are_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("data.npz").read_bytes()
    assert main([*SANITIZE, "--report", "data.npz"]) == 4
    assert "report and data are the same file" in _error(capsys)
    assert Path("data.npz").read_bytes() == before


def _onp(arguments: str, streams: str) -> int:
    """The exit code of ``onp``, this one, started by a shell with its streams as named."""
    line = f"exec {sys.executable} -m onp {arguments} {streams}"
    own = os.environ | {"PYTHONPATH": str(Path(onp.__file__).parents[1])}
    return subprocess.run(line, shell=True, check=False, capture_output=True, env=own).returncode


FULL = pytest.mark.skipif(
    not Path("/dev/full").exists(),
    reason="a disk that is full is played by /dev/full, which only Linux has",
)


@pytest.mark.parametrize(
    ("command", "streams", "code"),
    [
        ("--version", ">&-", 0),
        ("--version", "2>&-", 0),
        ("sanitize nothing.pt --data x --out o.safetensors", "2>&-", 4),
        pytest.param("--version", ">/dev/full", 5, marks=FULL),
        pytest.param("--version", "2>/dev/full", 0, marks=FULL),
        pytest.param(
            "sanitize nothing.pt --data x --out o.safetensors", "2>/dev/full", 4, marks=FULL
        ),
    ],
)
def test_streams_that_cannot_be_written(command: str, streams: str, code: int) -> None:
    assert _onp(command, streams) == code


# ---- evaluate, demo, doctor


def test_evaluate_without_trigger(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVALUATE, "--preset", "imagenet"]) == 0
    assert capsys.readouterr().out == "clean accuracy  50.00% of 12 images\n"


def test_evaluate_with_trigger(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVALUATE, "--trigger", "trigger.npz", "--target", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "attack success   25.00% of 8 triggered images, target 1"
    assert lines[2] == "robust accuracy  undefined of 8 triggered images, target 1"


def test_evaluate_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVALUATE, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["clean_accuracy"] == 0.5
    assert len(scores["sha256"]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trigger", "trigger.npz"], "go together"),
        (["--target", "1"], "go together"),
        (["--trigger", "missing.npz", "--target", "1"], "No such file"),
    ],
)
def test_evaluate_usage(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*EVALUATE, *options]) == 4
    assert message in _error(capsys)


@pytest.mark.parametrize("command", [["demo"], EVALUATE], ids=lambda part: part[0])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "torch sees no CUDA device here"),
        ("cuda:1", "torch sees no CUDA device here"),
        ("toaster", "device toaster cannot be used"),
        ("meta", "device meta cannot be used"),
    ],
)
def test_a_device_that_is_not_there(
    command: list[str], device: str, message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*command, "--device", device]) == 4
    assert message in _error(capsys)


def test_trigger_code_needs_trust(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "m.pt", "--data", "data.npz", "--trigger", "os:getcwd"]
    assert main([*arguments, "--target", "0"]) == 4
    assert "add --trust" in _error(capsys)


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert "Scores after\nclean accuracy  50.00% of 9 images\n" in captured.out
    assert captured.err == "demo 1/1 seed 3\n"
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == REPORT


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["extension"] == "loaded"
    assert isinstance(facts["cuda_in_build"], bool)
    assert len(facts["libgomp"]) <= 1
    assert main(["doctor"]) == 0
    assert "torch " in capsys.readouterr().out


def test_doctor_without_the_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("onp.ops.build_info", raising=False)
    monkeypatch.setitem(sys.modules, "onp.ops.build_info", None)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["extension"].startswith("cannot be imported")
