"""The searches that the agent is compared with, on a cost whose best mask is known."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from bench.ablations.__main__ import summary
from bench.ablations.searches import RIVALS, VARIANTS
from onp.agent.cost import Cost
from onp.agent.elite import Elite
from onp.config import Config

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


def test_the_summary_gives_means_and_the_spread_over_seeds() -> None:
    row = {
        "variant": "cem", "worth": -0.2, "cost": 0.1, "ca_before": 0.9, "ca_after": 0.88,
        "asr_after": 0.05, "der": 0.95, "der_ceiling": 1.0, "search_forwards": 1000,
    }  # fmt: skip
    text = summary([row | {"seed": 0}, row | {"seed": 1, "der": 0.93, "ca_after": 0.86}])
    assert (
        "| cem | 2 | -0.2000 | 0.1000 | 3.00 | 5.00 | 0.0600 | 0.0500 to 0.0700 | 1,000 |" in text
    )
