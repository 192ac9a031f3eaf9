"""Which evidence decides: the norm statistics, a short look by probes, or a longer one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import onp.evidence as story
from onp.clean import Clean
from onp.config import BUDGETS, Config
from onp.evaluate import MaskEvaluator
from onp.evidence import Evidence, Scene, gather
from onp.ledger import Ledger
from onp.suspect.trace import trace
from onp.verdict import Verdict

QUICK, LONGER = BUDGETS["quick"], BUDGETS["standard"]


def scene(config: Config) -> Scene:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    clean = Clean(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), torch.zeros(2, 3))
    evaluator = MaskEvaluator(
        trace(model, (3, 8, 8)), model, device=torch.device("cpu"), ledger=Ledger()
    )
    return Scene(model, evaluator, clean, [], config, (0.0, 1.0), seed=0)


def said(score: float, by: str = "probes") -> Evidence:
    found = score >= 0.55
    finding = "backdoor" if found else "clean"
    verdict = Verdict(finding, score, 1 if found else None, by, {}, "")  # type: ignore[arg-type]
    return Evidence(verdict, [], [])


@pytest.mark.parametrize(
    ("norms", "short", "longer", "score", "looks"),
    [
        (0.7, None, None, 0.7, 0),  # certain: no probe is asked
        (None, 0.3, None, 0.3, 1),  # a short look that calls nothing needs no other
        (None, 0.6, 0.8, 0.8, 2),
        (None, 0.6, 0.1, 0.1, 2),  # not borne out: clean
        (0.57, 0.6, 0.1, 0.57, 2),  # not borne out, but the norms had called as well
        (0.58, 0.56, None, 0.58, 1),
        (0.5, 0.6, 0.7, 0.7, 2),
    ],
)
def test_what_a_short_look_calls_a_longer_one_must_bear_out(
    norms: float | None,
    short: float | None,
    longer: float | None,
    score: float,
    looks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Config] = []

    def from_probes(scene: Scene) -> Evidence:
        asked.append(scene.config)
        answer = short if len(asked) == 1 else longer
        assert answer is not None
        return said(answer)

    def from_statistics(*_: object) -> Evidence | None:
        return None if norms is None else said(norms, "norm statistics")

    monkeypatch.setattr(story, "from_probes", from_probes)
    monkeypatch.setattr(story, "from_statistics", from_statistics)
    assert gather(scene(QUICK), None).verdict.score == score
    assert len(asked) == looks
    if looks == 2:
        expected = replace(
            QUICK, unlearning=LONGER.unlearning, synthesis=LONGER.synthesis, race=LONGER.race
        )
        assert asked == [QUICK, expected]


def test_without_another_budget_a_look_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "from_probes", lambda scene: said(0.6))
    assert gather(scene(replace(QUICK, confirmed_by=None)), None).verdict.score == 0.6
