"""What the machine is told to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onp import environment


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("nonsense", 8),
        (None, 8),
    ],
)
def test_cores_are_those_that_may_be_used(
    told: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    if told is not None:
        quota.write_text(told + "\n")
    monkeypatch.setattr(environment, "_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert environment.cores() == expected
