"""Gates close where the backdoor is."""

from __future__ import annotations

import torch
from torch import Tensor

from onp.agent.gates import learn_gates
from onp.agent.relaxed import RelaxedCost
from onp.clean import Clean
from onp.config import GatesConfig
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.masks import heads_of
from onp.probes.probe import Probe
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, PLANTED, SIZE, toy


def test_the_planted_channel_closes_first() -> None:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    clean = Clean.seen_by(evaluator, images, labels)
    ledger = Ledger()

    def closed(start: Tensor, *probes: Probe, steps: int = 30) -> Tensor:
        cost = RelaxedCost(
            evaluator.network, clean, probes, torch.ones(CHANNELS), GatesConfig(images_per_step=16)
        )
        return learn_gates(cost, start, steps=steps, learning_rate=0.1, seed=0, ledger=ledger)

    once = closed(torch.ones(CHANNELS), probe)
    assert once.shape == (CHANNELS,)
    assert float(once.min()) >= 0
    assert int(once.argmax()) == PLANTED
    assert ledger.total == 2 * 30 * (16 + 16)
    assert torch.equal(once, closed(torch.ones(CHANNELS), probe))
    assert int(closed(torch.ones(CHANNELS), probe, probe).argmax()) == PLANTED
    proposed = torch.linspace(0.5, 1, CHANNELS)
    torch.testing.assert_close(closed(proposed, probe, steps=0), 1 - proposed)


def test_heads_are_nested() -> None:
    masks = heads_of(torch.tensor([0.1, 0.9, 0.5]), (1, 2, 9))
    assert masks.tolist() == [[False, True, False], [False, True, True], [True, True, True]]
