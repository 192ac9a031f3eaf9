"""How searches in 8 bits are compared with fp32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench.search_precision import Comparison, compared, rank_correlation
from onp.agent.cost import Cost, Parts


def test_rank_correlation_sees_order_alone() -> None:
    values = torch.tensor([0.1, -3.0, 2.0, 0.2])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    swapped = torch.tensor([0.2, -3.0, 2.0, 0.1])
    assert rank_correlation(values, swapped) == pytest.approx(0.8)


class _Cost:
    """Logits of two images that 8 bits move: of the first, beyond the margin."""

    exact = False
    both = torch.zeros(2, 1)

    def __init__(self) -> None:
        self.evaluator = SimpleNamespace(run=self.run, rough_plan=object())

    def run(self, pruned: Tensor, images: Tensor, *, rough: bool = False) -> Tensor:
        exact = torch.tensor([[2.0, 1.0, 0.0], [0.1, 0.0, 0.0]])
        moved = torch.tensor([[2.0, 3.0, 0.0], [0.1, 0.2, 0.0]])
        return (moved if rough else exact).expand(len(pruned), -1, -1)

    def parts(self, pruned: Tensor) -> Parts:
        return cast(Parts, "exact" if self.exact else "rough")

    def worth(self, pruned: Tensor, parts: Any) -> Tensor:
        return pruned.sum(1).float() * (1 if parts == "exact" else -1)


def test_what_changed_and_by_how_much() -> None:
    found, cost = Comparison(), cast(Cost, _Cost())
    pruned = torch.tensor([[False, False], [True, False], [True, True]])
    found.add(cost, pruned, cost.parts(pruned))
    row = found.row()
    assert (row["answers_changed"], row["changed_beyond_margin"]) == (1.0, 1.0)
    assert row["largest_margin_changed"] == 1.0
    assert row["rank_correlation_within"] == pytest.approx(-1)
    assert row["same_best"] == 0.0
    assert not cost.exact


def test_nothing_is_compared_without_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cost, "parts", _Cost.parts)
    cost = _Cost()
    cost.evaluator.rough_plan = None
    with compared() as found:
        Cost.parts(cast(Cost, cost), torch.zeros(2, 2, dtype=torch.bool))
    assert not found.worths
    assert Cost.parts is _Cost.parts
