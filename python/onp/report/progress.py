"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from onp.ledger import Progress as Reporter
from onp.ledger import silent
from onp.report.streams import prints_on_stderr, tell

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[Reporter]:
    """What to call with progress, for the time of one command."""
    with prints_on_stderr():
        if quiet:
            yield silent
        elif sys.stderr is not None and sys.stderr.isatty():
            with _bars(Console(stderr=True)) as bars:
                yield _Bars(bars)
        else:
            yield _Lines()


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    return Progress(*columns, console=console)


class _Bars:
    """One bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, message: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, message="")
        self._progress.update(self._tasks[stage], completed=done, total=total, message=message)


class _Lines:
    """A line when a stage begins, when it ends, and every ten seconds between."""

    def __init__(self) -> None:
        self._stage = ""
        self._printed_at = 0.0

    def __call__(self, stage: str, done: int, total: int, message: str) -> None:
        now = time.monotonic()
        due = now - self._printed_at >= _SECONDS_BETWEEN_LINES
        if stage == self._stage and done < total and not due:
            return
        self._stage, self._printed_at = stage, now
        tell(f"{stage} {done}/{total} {message}".rstrip())
