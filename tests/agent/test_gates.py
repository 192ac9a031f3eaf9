"""Gates close where the backdoor is."""

from __future__ import annotations

import torch

from onp.agent.gates import learn_gates
from onp.agent.race import heads_of
from onp.clean import Clean
from onp.config import GatesConfig
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, PLANTED, SIZE, toy


def test_the_planted_channel_closes_first() -> None:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model)
    frozen, clean = evaluator.network, Clean.seen_by(evaluator, images, labels)
    config, ledger = GatesConfig(steps=30, images_per_step=16), Ledger()
    closed = learn_gates(
        frozen, clean, [probe], torch.ones(CHANNELS), config, seed=0, ledger=ledger
    )
    assert closed.shape == (CHANNELS,)
    assert float(closed.min()) >= 0
    assert int(closed.argmax()) == PLANTED
    assert ledger.total == 2 * 30 * (16 + 16)
    again = learn_gates(
        frozen, clean, [probe], torch.ones(CHANNELS), config, seed=0, ledger=Ledger()
    )
    assert torch.equal(closed, again)
    two = learn_gates(
        frozen,
        clean,
        [probe, probe],
        torch.ones(CHANNELS),
        config,
        seed=0,
        ledger=Ledger(),
    )
    assert int(two.argmax()) == PLANTED


def test_heads_are_nested() -> None:
    masks = heads_of(torch.tensor([0.1, 0.9, 0.5]), (1, 2, 9))
    assert masks.tolist() == [[False, True, False], [False, True, True], [True, True, True]]
