"""The survey of a library's networks: what it says of one that is taken, and of one that is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor, nn

from bench import coverage


class _Strided(nn.Module):
    """A convolution that the native engine lacks."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=dilation, dilation=dilation)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


def _refused() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(3600, 3))


def test_a_row_says_what_is_computed_and_by_what() -> None:
    rows = [
        coverage.row_of("plain", lambda: _Strided(1), 32),
        coverage.row_of("dilated", lambda: _Strided(2), 32),
        coverage.row_of("shuffled", lambda: _refused(), 32),
    ]
    assert [row["traced"] for row in rows] == [True, True, False]
    assert rows[0]["native_error"] < 1e-4
    assert rows[1]["native_error"] is None
    for row in rows[:2]:
        assert row["error"] < 1e-4
        assert row["gradient_cosine"] > 0.9999
    text = coverage.summary(rows)
    assert text.startswith("2 of 3 traced; of 2 that were computed, too, 1 by the native engine")
    assert "not shuffled: 1: modules of type PixelShuffle" in text
    assert "in torch dilated: masked_forward: conv must be an undilated Conv2d" in text


def test_a_large_network_is_only_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "MOST_PARAMETERS", 10)
    row = coverage.row_of("plain", lambda: _Strided(1), 32)
    assert row["traced"]
    assert "error" not in row


def test_lines_that_are_there_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[str] = []

    def create(name: str) -> nn.Module:
        built.append(name)
        return _Strided(1)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create))  # type: ignore[arg-type]
    out = tmp_path / "rows.jsonl"
    command = ["coverage", "timm", "--out", str(out), "--networks", "resnet18", "resnet50"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        assert coverage.main() == 0
    assert built == ["resnet18", "resnet50"]
    assert [json.loads(line)["network"] for line in out.read_text().splitlines()] == built
    assert "2 of 2 traced" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "no_such_network"])
    with pytest.raises(SystemExit, match="timm has no no_such_network"):
        coverage.main()
