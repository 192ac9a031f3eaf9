"""Many checkpoints, in several processes: what is done is written down at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onp import __version__
from onp.batch.jobs import Job, check_distinct
from onp.batch.journal import SCHEMA, Entry, Journal, entries_of
from onp.batch.supervisor import Lost, supervise
from onp.batch.worker import Outcome, Task, options_of, save_images, serve
from onp.checkpoint import RepairOptions
from onp.data import ImageSet
from onp.environment import cores
from onp.errors import ResourceError, UsageError
from onp.files import remove_temporaries


def journal_of(shard: str | None) -> str:
    """The journal's name in the batch's folder; every shard has its own."""
    return "journal.jsonl" if shard is None else f"journal-{shard.replace('/', '-of-')}.jsonl"


def repair_batch(
    jobs: Sequence[Job],
    clean: ImageSet,
    out: Path,
    options: RepairOptions,
    *,
    children: int = 1,
    timeout: float | None = None,
    trust: bool = False,
    journal: str = journal_of(None),
) -> Iterator[Outcome]:
    """Repair the jobs' checkpoints; yields what each came to, in the order in which they are done.

    ``clean``: the images for all, uint8 [N, H, W, 3]. Every job's weights and report go below the
    folder ``out``, which is there, and a line to its ``journal``. A job that a former run has done
    with the same settings is not done again, if its file is the same and its results are there; one
    that failed is. An error of one model, even one that ends its process, or more than ``timeout``
    seconds, does not touch the others. If ``options`` leave the threads open, the cores are dealt
    out to the children. These are spawned, so the caller's main module must be importable. Raises
    UsageError, before any work, where two jobs would write one file, or one that is there in a
    folder without a journal, and ``OnpError`` where the journal cannot be kept.
    """
    check_distinct(jobs)
    journals = sorted(out.glob("journal*.jsonl"))
    known: dict[tuple[str, str], list[Entry]] = {}
    for entry in (entry for path in journals for entry in entries_of(path)):
        known.setdefault((entry.out, entry.settings), []).append(entry)
    there = [path for job in jobs for path in (job.out, job.report) if path.exists()]
    if there and not journals:
        raise UsageError(f"{there[0]} is there, and no batch wrote it: take another --out")
    if options.threads is None:
        options = replace(options, threads=max(1, cores() // max(1, children)))
    images = _digest(clean)
    tasks = []
    for job in jobs:
        place = str(job.out.relative_to(out))
        settings = _settings(job.arch, images, options_of(job, options, clean))
        entry = Entry(model=str(job.model), out=place, settings=settings)
        tasks.append(Task(job, entry, tuple(known.get((place, settings), ()))))
    begun = {path for job in jobs for path in (job.out, job.report)}
    with _folder() as folder, closing(Journal(out / journal)) as kept:
        save_images(clean, told := folder / "clean.pt")
        remove_temporaries(begun)  # of a run that was killed
        arguments = (told, options, trust)
        running = supervise(tasks, serve, arguments, children=children, timeout=timeout)
        try:
            with closing(running):
                for task, result in running:
                    outcome = _lost(task, result) if isinstance(result, Lost) else result
                    if not outcome.before:
                        kept.append(outcome.entry)
                    yield outcome
        finally:
            remove_temporaries(begun)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the time of a batch."""
    try:
        folder = TemporaryDirectory(prefix="onp-batch-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ResourceError(f"cannot make a temporary folder: {error.strerror}") from None
    with folder as name:
        yield Path(name)


def _lost(task: Task, lost: Lost) -> Outcome:
    return Outcome(replace(task.entry, error=lost.reason, exit_code=ResourceError.exit_code))


def summary(outcomes: Sequence[Outcome], journal: Path) -> dict[str, Any]:
    """JSON-able: how many models got each verdict or failed, how many of them had been done before,
    and the ``entries`` of all, by name."""
    entries = sorted((outcome.entry for outcome in outcomes), key=lambda entry: entry.model)
    return {
        "schema": SCHEMA,
        "journal": str(journal),
        "models": len(entries),
        "backdoor": sum(entry.verdict == "backdoor" for entry in entries),
        "clean": sum(entry.verdict == "clean" for entry in entries),
        "suspected": sum(entry.verdict == "suspected" for entry in entries),
        "failed": sum(entry.failed for entry in entries),
        "done_before": sum(outcome.before for outcome in outcomes),
        "entries": [asdict(entry) for entry in entries],
    }


def _settings(arch: str | None, images: str, options: RepairOptions) -> str:
    """sha256 of what a repair depends on but the model's file: version, kind of network, images and
    options. Where it is computed (device, threads) is not in it."""
    told = asdict(options) | {"version": __version__, "arch": arch, "images": images}
    del told["device"], told["threads"]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest(clean: ImageSet) -> str:
    """sha256 of the images, their labels and the classes' names."""
    digest = hashlib.sha256(repr((tuple(clean.images.shape), clean.class_names)).encode())
    digest.update(clean.images.numpy().tobytes())
    digest.update(clean.labels.numpy().tobytes())
    return digest.hexdigest()
