"""The table of verdicts: areas that can be counted by hand, and calls that are told apart."""

from __future__ import annotations

import pytest
import torch

from bench.verdicts import auroc, summary


def test_the_area_counts_pairs() -> None:
    backdoored, clean = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.5, 0.1])
    assert auroc(backdoored, clean) == pytest.approx((2 + 1.5 + 1) / 6)
    assert auroc(clean, backdoored) == pytest.approx(1 - 4.5 / 6)


def test_calls_and_classes_are_counted() -> None:
    row = {"seed": 0, "backdoored": True, "target": "3", "finding": "backdoor", "score": 0.9}
    rows = [
        row | {"named": "3"},
        row | {"named": "4"},
        row | {"target": None, "named": "1", "score": 0.7},
        row
        | {"backdoored": False, "target": None, "finding": "clean", "named": None, "score": 0.0},
    ]
    assert (
        summary(rows).splitlines()[2] == "| 0 | 3 of 3 | 0 of 1 | 1 of 2 | 1.000 (1.000 to 1.000) |"
    )
    assert summary(rows[:3]).splitlines()[2] == "| 0 | 3 of 3 | 0 of 0 | 1 of 2 | – |"
