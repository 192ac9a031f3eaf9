"""A child of a batch: repairs one checkpoint after another."""

from __future__ import annotations

import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from onp.batch.jobs import Job
from onp.batch.journal import Entry
from onp.batch.supervisor import Reply, obey
from onp.checkpoint import RepairOptions, repair_checkpoint
from onp.data import ImageSet
from onp.errors import ResourceError, UsageError, explained
from onp.files import make_folder, write_json
from onp.suspect.files import sha256_of
from onp.suspect.load import load_suspect


@dataclass(frozen=True)
class Task:
    """A job, and what is known of it."""

    job: Job
    entry: Entry
    """As far as it is known before."""
    before: tuple[Entry, ...] = ()
    """What former runs with the same settings came to."""


@dataclass(frozen=True)
class Outcome:
    """What a task came to."""

    entry: Entry
    before: bool = False
    """It had been done already: the file and the settings are the same, and the results there."""


def serve(pipe: Connection, clean: Path, options: RepairOptions, trust: bool) -> None:
    """A child's ``obey``: takes ``Task`` and gives ``Outcome``. ``clean`` is what ``save_images``
    wrote."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    told: dict[str, Any] = torch.load(clean, weights_only=True)
    images = ImageSet(told["images"], told["labels"], tuple(told["class_names"]))
    obey(pipe, lambda task: _reply(task, images, options, trust))


def save_images(clean: ImageSet, path: Path) -> None:
    """Write images and labels for ``serve``. Raises ResourceError where there is no room."""
    told = {
        "images": clean.images.clone(),  # a view would bring all that it is of
        "labels": clean.labels.clone(),
        "class_names": list(clean.class_names),
    }
    try:
        torch.save(told, path)
    except (OSError, RuntimeError) as error:
        raise ResourceError(f"cannot write {path}: {error}") from None


def _reply(task: Task, clean: ImageSet, options: RepairOptions, trust: bool) -> Reply:
    """Repair the task's checkpoint, unless that was done before. No error leaves: it is told. After
    one that was not foreseen, or where something ran out, a child is not what it was."""
    entry = task.entry
    started = time.perf_counter()
    try:
        entry = replace(entry, sha256=sha256_of(task.job.model))
        for before in task.before:
            if _stands(before, entry, task.job):
                return Reply(Outcome(replace(before, model=entry.model), before=True))
        entry = _repaired(task.job, entry, clean, options, trust)
    except Exception as error:
        told = explained(error)
        if not told.foreseen:
            with suppress(OSError):  # nobody may be listening
                print(f"{task.job.model}:", file=sys.stderr)
                traceback.print_exc()
        failed = replace(entry, error=told.message, exit_code=told.exit_code)
        goes_on = told.foreseen and not told.ran_out
        return Reply(Outcome(failed), goes_on=goes_on, again=told.ran_out)
    return Reply(Outcome(replace(entry, seconds=round(time.perf_counter() - started, 3))))


def options_of(job: Job, options: RepairOptions, clean: ImageSet) -> RepairOptions:
    """How this one is to be repaired. Raises UsageError where the class it names is none."""
    if job.target is None:
        return options
    try:
        return replace(options, target=clean.class_of(job.target))
    except UsageError as error:
        raise UsageError(f"{job.model}: {error}") from None


def _repaired(
    job: Job, entry: Entry, clean: ImageSet, options: RepairOptions, trust: bool
) -> Entry:
    """The entry of a repair that has written its weights and its report."""
    suspect = load_suspect(job.model, job.arch, trust)
    make_folder(job.out.parent)
    report = repair_checkpoint(suspect, clean, job.out, options_of(job, options, clean))
    write_json(job.report, report)
    return replace(
        entry,
        sha256=suspect.file.sha256,
        verdict=report["verdict"],
        score=report["score"],
        target_classes=tuple(report["target_classes"]),
        pruned=report["sites"]["pruned"],
        accuracy_before=report["accuracy"]["before"],
        accuracy_after=report["accuracy"]["after"],
        out_sha256=report["repaired"]["sha256"],
        report_sha256=sha256_of(job.report),
    )


def _stands(before: Entry, now: Entry, job: Job) -> bool:
    """Whether a former repair is of the same file, and its results are still there. (Of a clean
    model weights are the same with all settings, but not the report.)"""
    return (
        not before.failed
        and before.sha256 == now.sha256
        and job.out.is_file()
        and job.report.is_file()
        and sha256_of(job.out) == before.out_sha256
        and sha256_of(job.report) == before.report_sha256
    )
