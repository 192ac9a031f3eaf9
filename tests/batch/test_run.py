"""A batch of real networks: the demo's, its clean twin, and files that are neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onp
from onp import demo
from onp.__main__ import main
from onp.batch.jobs import Job
from onp.batch.journal import Entry, entries_of
from onp.batch.run import _digest, _settings, journal_of, repair_batch
from onp.batch.worker import Task, _reply
from onp.checkpoint import RepairOptions
from onp.data import PRESETS
from onp.errors import BadData
from onp.files import _create_temporary
from onp.suspect.files import sha256_of

CLEAN_TWIN = Path(__file__).parents[1] / "data" / "demo_clean.safetensors"
OPTIONS = ["--arch", demo.ARCH, "--budget", "quick", "--data", "clean.npz", "--clean-samples", "96"]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = demo.clean_images()
    np.savez("clean.npz", images=images.images.numpy(), labels=images.labels.numpy())
    Path("hub/a").mkdir(parents=True)
    shutil.copy(demo.CHECKPOINT, "hub/a/m.safetensors")
    shutil.copy(CLEAN_TWIN, "hub/twin.safetensors")
    Path("hub/bad.pt").write_bytes(b"\x80\x02junk")


def _batch(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = main(["batch", "hub", "--out", "out", *OPTIONS, "--json", "--quiet", *options])
    return code, json.loads(capsys.readouterr().out)


def test_a_batch_repairs_goes_on_and_gives_what_single_repairs_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, told = _batch(capsys, "--jobs", "2", "--threads", "1")
    assert code == 2  # one failed
    assert (told["models"], told["backdoor"], told["clean"], told["failed"]) == (3, 1, 1, 1)
    assert told["done_before"] == 0
    backdoored, bad, clean = told["entries"]
    assert backdoored["target_classes"] == [demo.TARGET]
    assert clean["pruned"] == 0
    assert bad["error"].startswith("hub/bad.pt: damaged")
    assert not list(Path("out").rglob("bad*"))

    alone = ["sanitize", "hub/a/m.safetensors", *OPTIONS, "--out", "alone.safetensors"]
    assert main([*alone, "--threads", "1", "--quiet", "--report", "alone.json"]) == 0
    capsys.readouterr()
    assert Path("out/a/m.safetensors").read_bytes() == Path("alone.safetensors").read_bytes()
    report = json.loads(Path("out/a/m.json").read_text())
    assert report["layers"] == json.loads(Path("alone.json").read_text())["layers"]
    assert report["repaired"]["sha256"] == backdoored["out_sha256"]

    written = Path("out/a/m.safetensors").stat().st_mtime_ns
    Path("hub/bad.pt").unlink()
    Path("out/twin.json").write_text("{}")  # its report is no longer what was written
    code, again = _batch(capsys, "--fail-on", "backdoor", "--shard", "1/1")
    assert code == 1
    assert (again["models"], again["failed"], again["done_before"]) == (2, 0, 1)
    assert again["journal"] == "out/journal-1-of-1.jsonl"
    assert Path("out/a/m.safetensors").stat().st_mtime_ns == written
    assert json.loads(Path("out/twin.json").read_text())["verdict"] == "clean"
    assert len(entries_of(Path("out/journal.jsonl"))) == 3

    shutil.copy(CLEAN_TWIN, "hub/a/m.safetensors")  # another model of the same name
    code, other = _batch(capsys, "--fail-on", "backdoor")
    assert (code, other["clean"], other["done_before"]) == (0, 2, 1)


def test_a_list_names_a_class_for_one_of_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    def told(rows: str) -> tuple[list[str], int]:
        Path("list.csv").write_text(f"model,target\n{rows}")
        options = ["--list", "list.csv", "--out", "told", *OPTIONS, "--json", "--quiet"]
        assert main(["batch", *options, "--threads", "1"]) == 0
        found = json.loads(capsys.readouterr().out)
        return [entry["verdict"] for entry in found["entries"]], found["done_before"]

    assert told("hub/twin.safetensors,\n") == (["clean"], 0)
    assert told("hub/twin.safetensors,3\n") == (["suspected"], 0)  # another repair
    report = json.loads(Path("told/hub/twin.json").read_text())
    assert (report["told_class"], report["target_classes"]) == (3, [3])
    assert told("hub/twin.safetensors,3\n") == (["suspected"], 1)


def test_every_setting_tells_two_repairs_apart() -> None:
    """But where it is computed, and how many at a time."""
    options = RepairOptions()
    changed = [
        replace(options, budget="quick"),
        replace(options, seed=1),
        replace(options, preprocess=PRESETS["cifar10"]),
        replace(options, recalibrate=True),
        replace(options, finetune=True),
        replace(options, compact=True),
        replace(options, target=0),
    ]
    told = [_settings("vgg11", "images", one) for one in [options, *changed]]
    told += [_settings("vgg16", "images", options), _settings("vgg11", "others", options)]
    assert len(set(told)) == len(told) == 10
    elsewhere = replace(options, device="cuda", threads=3)
    assert _settings("vgg11", "images", elsewhere) == told[0]
    assert {field.name for field in fields(RepairOptions)} == {
        "budget", "seed", "preprocess", "recalibrate", "finetune", "compact", "target",
        "device", "threads",
    }  # fmt: skip
    images = demo.clean_images()
    names = replace(images, class_names=tuple("abcdefghij"))
    labels = replace(images, labels=images.labels.flip(0))
    assert len({_digest(one) for one in (images, names, labels, images[torch.arange(9)])}) == 4


def test_text_names_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.csv").write_text("model\nhub/twin.safetensors\nhub/bad.pt\n")
    assert main(["batch", "--list", "list.csv", "--out", "new/out", *OPTIONS]) == 2
    captured = capsys.readouterr()
    first, last = captured.out.splitlines()
    assert first.startswith("failed    hub/bad.pt: damaged")
    assert last == "2 models: 0 backdoor, 1 clean, 1 failed (new/out/journal.jsonl)"
    assert "batch 2/2 " in captured.err
    assert Path("new/out/hub/twin.json").exists()


def test_a_model_that_takes_too_long_fails() -> None:
    job, out = Job(Path("hub/twin.safetensors"), demo.ARCH, Path("out/t.safetensors")), Path("out")
    out.mkdir()
    begun = _create_temporary(job.out)[0]  # by a run that was killed
    other = _create_temporary(out / "other.safetensors")[0]
    (outcome,) = repair_batch([job], demo.clean_images(), out, RepairOptions(), timeout=0.01)
    assert outcome.entry.error == "it took more than 0.01 s"
    assert outcome.entry.exit_code == 5
    assert entries_of(out / "journal.jsonl") == [outcome.entry]
    assert (begun.exists(), other.exists()) == (False, True)


def test_what_no_batch_has_written_is_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/twin.json").touch()
    assert main(["batch", "hub/twin.safetensors", "--out", "mine", *OPTIONS]) == 4
    assert "mine/twin.json is there, and no batch wrote it" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["twin.json"]


@pytest.mark.parametrize(
    ("error", "goes_on", "again"),
    [(BadData("x"), True, False), (MemoryError(), False, True), (KeyError("x"), False, False)],
)
def test_a_child_that_is_not_what_it_was_is_done(
    error: Exception, goes_on: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("onp.batch.worker.repair_checkpoint", fail)
    job = Job(Path("hub/twin.safetensors"), demo.ARCH, Path("out/t.safetensors"))
    task = Task(job, Entry("m", "t.safetensors", "s"))
    reply = _reply(task, demo.clean_images(), RepairOptions(), False)
    assert (reply.goes_on, reply.again) == (goes_on, again)
    assert reply.result.entry.failed
    assert reply.result.entry.sha256 == sha256_of(CLEAN_TWIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name checkpoints or folders, or a --list"),
        (["hub", "--list", "list.csv"], "name checkpoints or folders, or a --list"),
        (["nowhere"], "model not found"),
        (["hub", "--shard", "3/2"], "--shard must be"),
        (["hub/a/m.safetensors", "--out", "hub/a"], "written over a model"),
        (["hub", "--out", "hub"], "--out hub holds the models"),
        (["hub", "--out", "clean.npz"], "cannot make the folder clean.npz"),
        (["hub", "--device", "abacus"], "device abacus cannot be used"),
        (["hub", "--threads", "100000"], "threads must be a number from 1 to"),
        (["hub", "--arch", "alexnet"], "unknown architecture 'alexnet'"),
        (["hub", "--arch", "os:getcwd"], "add --trust"),
        (["hub", "--jobs", "0"], "Invalid value for '--jobs'"),
    ],
)
def test_wrong_usage_is_4_before_any_work(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", "--out", "out", *OPTIONS, *options]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert not Path("out").exists()


def test_sigterm_is_an_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onp", "batch", "hub", "--out", "out", *OPTIONS]
    path = str(Path(onp.__file__).parents[1])
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not Path("out/journal.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)  # children, too, have this pipe
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "onp: error: interrupted"
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_exit_code_does_not_depend_on_who_reads() -> None:
    command = [sys.executable, "-m", "onp", "batch", "hub/bad.pt", "--out", "out", *OPTIONS]
    path = str(Path(onp.__file__).parents[1])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*command, "--quiet"], env=os.environ | {"PYTHONPATH": path},
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (2, "")


def test_every_shard_has_a_journal_of_its_own() -> None:
    assert journal_of(None) == "journal.jsonl"
    assert journal_of("1/4") == "journal-1-of-4.jsonl"
