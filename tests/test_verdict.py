"""The verdict needs an advantage over other classes; the rest only supports it."""

from __future__ import annotations

import pytest

from onp.config import VerdictConfig
from onp.verdict import judge

CONFIG = VerdictConfig()


def test_a_backdoor_shows_in_all_three() -> None:
    verdict = judge(4, 2.0, 0.98, 0.95, CONFIG)
    assert (verdict.finding, verdict.target, verdict.score) == ("backdoor", 4, 1.0)
    assert "2^2.0" in verdict.reason


@pytest.mark.parametrize("advantage", [-3.0, 0.0, 0.4])
def test_without_advantage_nothing_else_counts(advantage: float) -> None:
    verdict = judge(4, advantage, 1.0, 1.0, CONFIG)
    assert (verdict.finding, verdict.target, verdict.score) == ("clean", None, 0.0)


def test_the_score_grows_with_each_piece() -> None:
    base = judge(0, 0.9, 0.5, 0.6, CONFIG).score
    assert judge(0, 1.0, 0.5, 0.6, CONFIG).score > base
    assert judge(0, 0.9, 0.6, 0.6, CONFIG).score > base
    assert judge(0, 0.9, 0.5, 0.7, CONFIG).score > base


def test_a_probe_that_cannot_be_pruned_away_is_no_evidence() -> None:
    assert judge(0, 2.0, 1.0, 0.0, CONFIG).score == 0.0
