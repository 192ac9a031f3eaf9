"""What a run cost: image-forwards and seconds per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, message): of the stage's ``total`` steps ``done`` are done."""


def silent(stage: str, done: int, total: int, message: str) -> None:
    """A Progress that says nothing."""


class Ledger:
    """Counts image-forwards by stage (see ``onp.config``) and hears of progress."""

    def __init__(self, progress: Progress = silent) -> None:
        self.forwards: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._stage = "start"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; what is counted inside belongs to it."""
        outer, self._stage = self._stage, name
        self.forwards.setdefault(name, 0)
        started = time.perf_counter()
        self.tick(0, 1)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.tick(1, 1, f"{spent:.1f} s")
            self._stage = outer

    def count(self, image_forwards: int) -> None:
        """Add to the current stage's image-forwards."""
        self.forwards[self._stage] = self.forwards.get(self._stage, 0) + image_forwards

    def tick(self, done: int, total: int, message: str = "") -> None:
        """Report progress within the current stage."""
        self._progress(self._stage, done, total, message)

    @property
    def total(self) -> int:
        return sum(self.forwards.values())
