"""Progress: bars on a terminal, sparse lines elsewhere, silence when asked for."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from onp.report import progress
from onp.report.progress import progress_on_stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_sparse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 11.5, 12.0, 13.0, 14.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress_on_stderr(quiet=False) as report:
        report("probes", 0, 4, "")
        report("probes", 1, 4, "too soon")
        report("probes", 2, 4, "ten seconds later")
        report("probes", 3, 4, "too soon")
        report("probes", 4, 4, "the end")
        report("race", 0, 9, "another stage")
    assert capsys.readouterr().err.splitlines() == [
        "probes 0/4",
        "probes 2/4 ten seconds later",
        "probes 4/4 the end",
        "race 0/9 another stage",
    ]


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr(quiet=True) as report:
        report("probes", 0, 4, "hello")
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=90)
    )
    with progress_on_stderr(quiet=False) as report:
        report("probes", 1, 2, "[patch], class 2")
        report("race", 3, 3, "done")
    shown = terminal.getvalue()
    assert "probes" in shown
    assert "[patch], class 2" in shown
    assert "race" in shown
