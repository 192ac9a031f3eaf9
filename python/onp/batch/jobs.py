"""Which checkpoints a batch repairs, and where each goes."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onp.errors import UsageError
from onp.files import file_error

SUFFIXES = (".safetensors", ".pt", ".pth")
"""Files that are taken from a folder."""
_COLUMNS = {"model", "arch", "target"}


@dataclass(frozen=True)
class Job:
    """One checkpoint."""

    model: Path
    arch: str | None
    """The kind of network, as in ``onp.suspect.load.load_suspect``."""
    out: Path
    """Where the repaired weights go, ``.safetensors``."""
    target: str | None = None
    """The class that is suspected, by name or number."""

    @property
    def report(self) -> Path:
        """Where the report goes, beside the weights."""
        return self.out.with_suffix(".json")


def jobs_of_paths(models: Iterable[Path], arch: str | None, out: Path) -> list[Job]:
    """A job for each file, and for each checkpoint in each folder (``SUFFIXES``, at any depth, but
    not below ``out``). What a folder holds keeps its place in it; a file that is named twice counts
    once. Raises UsageError where a path is not there or a folder holds none."""
    jobs = []
    for path in models:
        try:
            if path.is_dir():
                jobs += _jobs_in(path, arch, out)
            elif path.exists():
                jobs.append(Job(path, arch, _repaired(out, Path(path.name))))
            else:
                raise UsageError(f"model not found: {path}")
        except OSError as error:
            raise file_error("read", path, error) from None
    return list(dict.fromkeys(jobs))


def _jobs_in(folder: Path, arch: str | None, out: Path) -> list[Job]:
    below = out.resolve()
    if below in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(f"--out {out} holds the models of {folder}: take another folder")

    def fail(error: OSError) -> None:
        raise error

    inside = sorted(
        file
        for at, _, names in os.walk(folder, onerror=fail)
        for file in (Path(at, name) for name in names)
        if file.suffix in SUFFIXES and file.is_file() and below not in file.resolve().parents
    )
    if not inside:
        raise UsageError(f"no {', '.join(SUFFIXES)} file in {folder}")
    return [Job(file, arch, _repaired(out, file.relative_to(folder))) for file in inside]


def jobs_of_list(listing: Path, arch: str | None, out: Path) -> list[Job]:
    """A job for each row of a CSV file with the columns ``model``, if they differ ``arch`` and,
    where a class is suspected, its name or number as ``target``; paths are relative to the list,
    and keep their place. Raises UsageError, naming the line."""
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise file_error("read", listing, error) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--list {listing} is no UTF-8 text: {error.reason}") from None
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    jobs = []
    try:
        rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        columns = set(rows.fieldnames)
        if "model" not in columns or columns - _COLUMNS:
            found = ", ".join(sorted(map(str, columns))) or "none"
            raise UsageError(
                f"--list {listing} must have a column model, and may have arch and target, "
                f"got {found}"
            )
        for row in rows:
            where = f"--list {listing}, line {rows.line_num}"
            if None in row or not (row["model"] or "").strip():
                raise UsageError(f"{where}: expected a model and at most an arch and a target")
            model = Path(row["model"].strip())
            if not (listing.parent / model).is_file():
                raise UsageError(f"{where}: no such file: {listing.parent / model}")
            kind, target = (
                (row.get(column) or "").strip() or default
                for column, default in (("arch", arch), ("target", None))
            )
            jobs.append(Job(listing.parent / model, kind, _repaired(out, _inside(model)), target))
    except csv.Error as error:
        raise UsageError(f"--list {listing}, line {rows.line_num + 1}: {error}") from None
    except OSError as error:
        raise UsageError(f"--list {listing}, line {rows.line_num}: {error.strerror}") from None
    if not jobs:
        raise UsageError(f"--list {listing} names no model")
    return list(dict.fromkeys(jobs))


def check_distinct(jobs: Sequence[Job]) -> None:
    """Raise UsageError where two jobs would write one file, or one would write over a model."""
    models = {job.model.resolve() for job in jobs}
    seen: dict[Path, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.out, job)
        if other is not job and other.model == job.model:
            raise UsageError(f"{job.model} is named twice, with another arch or target")
        if other is not job:
            raise UsageError(
                f"{other.model} and {job.model} would both be written to {job.out}: name a folder "
                "that holds both, or repair them by themselves, into another --out"
            )
        if models & {job.out.resolve(), job.report.resolve()}:
            raise UsageError(f"{job.out} would be written over a model: take another --out")


def shard_of(jobs: Sequence[Job], text: str) -> list[Job]:
    """The share ``i/n`` of the jobs, i from 1 to n: every n-th, so that n machines that are given
    the same jobs do each of them once. Raises UsageError for any other text."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard must be i/n with 1 <= i <= n, such as 1/4, got {text!r}")
    return list(jobs[int(number) - 1 :: int(count)])


def _repaired(out: Path, name: Path) -> Path:
    """``a/m.pt`` goes to ``a/m.pt.safetensors``, as ``a/m.pth`` may stand beside it."""
    return out / (name if name.suffix == ".safetensors" else Path(f"{name}.safetensors"))


def _inside(path: Path) -> Path:
    """The path without what would lead out of a folder."""
    return Path(*(part for part in path.parts if part not in (path.anchor, "..")))
