"""The searches that the agent is compared with, on a cost whose best mask is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench.ablations.__main__ import at_variant, summary
from bench.ablations.searches import POLICIES, RIVALS, VARIANTS
from bench.ablations.setting import _KEPT
from bench.zoo.folds import attack_fold
from bench.zoo.recipes import CORE
from onp.agent.cost import Cost
from onp.agent.elite import Elite
from onp.config import Config
from onp.errors import UsageError
from onp.evidence import Evidence
from onp.probes.margin import Margins
from onp.probes.probe import Probe
from onp.probes.race import Contender
from onp.probes.square import SQUARES
from onp.scene import Squares
from onp.verdict import Verdict

SITES = 40


class Linear:
    """Worth = weights of the pruned sites; counts the masks it is asked for."""

    def __init__(self) -> None:
        self.weights = torch.linspace(-1, 1, SITES)
        self.sites, self.asked = SITES, 0

    def worth(self, masks: Tensor) -> Tensor:
        self.asked += len(masks)
        return masks.float() @ self.weights


@pytest.mark.parametrize("name", ["cem", "random"])
def test_rivals_improve_within_what_they_are_given(name: str) -> None:
    cost, elite = Linear(), Elite(5)
    elite.offer(torch.zeros(1, SITES, dtype=torch.bool), torch.zeros(1))
    RIVALS[name](elite, cast("Cost", cost), 300, torch.Generator().manual_seed(0))
    assert cost.asked == 300
    assert elite.worths[0] > 1
    assert float(elite.best.float() @ cost.weights) == pytest.approx(elite.worths[0])


def test_gates_alone_evaluates_nothing() -> None:
    cost, elite = Linear(), Elite(5)
    elite.offer(torch.zeros(1, SITES, dtype=torch.bool), torch.zeros(1))
    RIVALS["gates-alone"](elite, cast("Cost", cost), 300, torch.Generator())
    assert cost.asked == 0
    assert not elite.best.any()


def test_every_variant_changes_one_thing() -> None:
    config = Config()
    changed = {name: change(config) for name, change in VARIANTS.items()}
    assert changed.pop("onp") == config
    assert all(other != config for other in changed.values())
    assert len({str(other) for other in changed.values()}) == len(changed)


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_was_taught_without_the_attack_that_it_repairs(name: str, tmp_path: Path) -> None:
    class Setting:
        """Says what it is asked for."""

        search = SimpleNamespace(config=Config())

        def at(self, config: Config) -> Config:
            return config

    setting: Any = Setting()
    for recipe in (recipe for recipe in CORE if recipe.attack != "clean"):
        file = tmp_path / f"{attack_fold(CORE, recipe)}_{POLICIES[name]}.safetensors"
        file.with_suffix(".json").write_text(json.dumps({"kept_out": [recipe.attack]}))
        asked: Any = at_variant(name, setting, recipe, tmp_path)
        assert asked.gates.policy == str(file)
        file.with_suffix(".json").write_text(json.dumps({"kept_out": ["another"]}))
        with pytest.raises(UsageError, match="was not taught without"):
            at_variant(name, setting, recipe, tmp_path)


def test_the_summary_compares_on_the_cases_that_both_have() -> None:
    own = {
        "variant": "onp", "model": "a", "worth": -0.1, "ca_before": 0.9, "ca_after": 0.89,
        "asr_after": 0.01, "der": 0.97, "der_ceiling": 1.0, "search_forwards": 900,
        "choice_forwards": 100,
    }  # fmt: skip
    other = own | {"variant": "cem", "worth": -0.2, "asr_after": 0.05, "der": 0.95}
    rows = [
        own | {"seed": 0},
        own | {"seed": 1},
        other | {"seed": 0},
        other | {"seed": 1, "der": 0.93, "ca_after": 0.86},
        other | {"seed": 2, "der": 0.0},  # onp has no row of this seed
    ]
    assert summary(rows).splitlines()[-1] == (
        "| cem | 2 | -0.2000 | 2.50 | 5.00 | 6.00 | +3.00 (+2.00 to +4.00) "
        "| +1.50 (+0.00 to +3.00) | 1,000 |"
    )


def test_evidence_that_is_kept_can_be_read_back(tmp_path: Path) -> None:
    """With a square that called among it."""
    square = SQUARES[3]
    state = square.start(1, (3, 8, 8), torch.Generator().manual_seed(0))
    probe, sites = Probe(square, 2, state, (0.0, 1.0), 1.0), torch.zeros(SITES)
    contender = Contender(probe, sites, 0.9, sites.bool())
    verdict = Verdict("backdoor", 1.0, 2, "squares", {"advantage": 3.0}, "")
    squares = Squares([0, 1, 2], torch.rand(16, 3), {3: torch.rand(3)})
    margins = Margins([0, 1, 2], torch.rand(3), torch.rand(3))
    kept = Evidence(verdict, [contender], [contender], squares=squares, margins=margins)
    torch.save((None, kept), tmp_path / "kept.pt")
    with torch.serialization.safe_globals(_KEPT):
        _, read = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert read.verdict == verdict
    assert read.counted[0].probe.family == square
    assert torch.equal(read.counted[0].probe.parameters[0], state[0])
    assert torch.equal(read.squares.successes, squares.successes)
    assert torch.equal(read.squares.judged, squares.judged)
    assert torch.equal(read.margins.driven, margins.driven)
