"""Where a command's time went: wall clock and image-forwards, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Wall clock of a command: what its own steps took, and all of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started


def profile(watch: Stopwatch, repair: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a command's wall clock holds: JSON-able.

    The step called ``repair`` is split into the stages of a repair's report (its ``seconds`` and
    ``image_forwards``). ``accounted``: share of the wall clock that is in some stage.
    """
    wall = watch.total
    stages: list[dict[str, Any]] = []

    def add(stage: str, seconds: float, forwards: int) -> None:
        share = round(seconds / wall, 4)
        stages.append(
            {"stage": stage, "seconds": round(seconds, 3), "share": share,
             "image_forwards": forwards}
        )  # fmt: skip

    for step, seconds in watch.seconds.items():
        if step != repair:
            add(step, seconds, 0)
            continue
        for stage, spent in report["seconds"].items():
            if stage != "total":
                add(stage, spent, report["image_forwards"].get(stage, 0))
    known = sum(row["seconds"] for row in stages)
    return {"wall": round(wall, 3), "accounted": round(known / wall, 4), "stages": stages}
