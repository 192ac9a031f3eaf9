"""What a batch has done, a line of JSON for each model, so that a run that was stopped goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from onp.errors import UsageError
from onp.files import file_error, sync

SCHEMA = "onp.batch/1"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
"""What file systems of clusters say that know none."""


@dataclass(frozen=True)
class Entry:
    """One model, repaired or not."""

    model: str
    """Its path as it was given."""
    out: str
    """Where the repaired weights are, relative to the batch's folder."""
    settings: str
    """sha256 of everything that decides what the repair gives but the model: see ``run.py``."""
    sha256: str | None = None
    """Of the model's file; None where it was not read to its end."""
    verdict: str | None = None
    """``backdoor``, ``clean`` or ``suspected``; None if it failed."""
    score: float | None = None
    target_classes: tuple[int, ...] = ()
    pruned: int | None = None
    """Sites."""
    accuracy_before: float | None = None
    """On the clean images."""
    accuracy_after: float | None = None
    out_sha256: str | None = None
    report_sha256: str | None = None
    seconds: float | None = None
    """From reading to the written report; None if it failed."""
    error: str | None = None
    exit_code: int = 0
    """Of the command's exit codes the one that fits the error."""

    @property
    def failed(self) -> bool:
        return self.error is not None


class Journal:
    """A file of entries that only grows, kept by one batch at a time."""

    def __init__(self, path: Path) -> None:
        """Open or make it. Raises UsageError or ResourceError where that cannot be, and UsageError
        if another process has it open (as far as the file system can tell)."""
        self.path = path
        try:
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise file_error("write", path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UsageError(f"another batch is writing {path}: wait for it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.close()
                raise file_error("write", path, error) from None
        sync(path.parent)

    def append(self, entry: Entry) -> None:
        """Add the entry; it is on the disk before this returns. Raises UsageError or ResourceError
        where that cannot be."""
        line = json.dumps({"schema": SCHEMA, **asdict(entry)}, allow_nan=False) + "\n"
        try:
            size = self._file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(self._file.fileno(), 1, size - 1) != b"\n"
            data = ("\n" * torn + line).encode()
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise file_error("write", self.path, error) from None

    def close(self) -> None:
        self._file.close()


def entries_of(path: Path) -> list[Entry]:
    """All entries of a journal, the oldest first; a line that was cut off, or is of another kind,
    is none. Raises UsageError or ResourceError where it cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise file_error("read", path, error) from None
    return [entry for line in lines if (entry := _entry(line)) is not None]


def _entry(line: bytes) -> Entry | None:
    try:
        values = json.loads(line)
        if values.pop("schema") != SCHEMA:
            return None
        values["target_classes"] = tuple(values["target_classes"])
        known = {field.name for field in fields(Entry)}
        return Entry(**{name: value for name, value in values.items() if name in known})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
