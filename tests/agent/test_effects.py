"""The model of the margins: gradients against differences, gains against what flips really do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onp.agent.cost import Cost
from onp.agent.effects import Effects, columns, flip_effects
from onp.agent.flips import flipped
from onp.answers import margin
from onp.clean import Clean
from onp.config import CostConfig
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, PLANTED, SIZE, toy


@pytest.fixture(scope="module")
def cost() -> Cost:
    """Of the toy: two classes, logits linear in the gates, so that the model is exact there."""
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model, ledger=Ledger())
    clean = Clean.seen_by(evaluator, images, labels)
    return Cost(evaluator, clean[:70], [probe], CostConfig())


def some_mask() -> Tensor:
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    mask[[3, 11]] = True
    return mask


def test_a_margin_is_a_logit_over_the_others() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    found = margin(logits, torch.tensor([0, 1]))
    expected = torch.stack(
        [2 - torch.tensor([1.0, 0.0]).logsumexp(0), -torch.tensor([0.0, 5.0]).logsumexp(0)]
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sigmoid(), logits.softmax(1)[[0, 1], [0, 1]])


def test_changes_are_those_of_the_margins(cost: Cost) -> None:
    mask = some_mask()
    before = cost.evaluator.ledger.total
    effects = flip_effects(cost, mask)
    assert cost.evaluator.ledger.total - before == 4 * len(cost.images)
    network = cost.evaluator.network
    for site in (0, 3, PLANTED, CHANNELS - 1):
        flip = mask.clone()
        flip[site] ^= True
        for images, answers, now, change in (
            (cost.images, cost.labels, effects.clean, effects.clean_change),
            (cost.triggered, cost.wanted, effects.triggered, effects.triggered_change),
        ):
            found = margin(network(images, (~flip).float()), answers) - now
            torch.testing.assert_close(change[:, site], found, atol=2e-3, rtol=2e-3)


def test_the_gains_are_what_flips_really_bring(cost: Cost) -> None:
    mask = some_mask()
    effects = flip_effects(cost, mask)
    moves = [*torch.arange(CHANNELS).split(1), torch.tensor([0, 3, PLANTED])]
    gains = cost.parts(flipped(mask, moves)).gains(cost.parts(mask[None]))
    found = torch.stack(effects.together(columns(moves, CHANNELS)))
    torch.testing.assert_close(found, gains, atol=1e-4, rtol=1e-3)
    alone = gains.sum(0)[:-1] + torch.where(mask, 1.0, -1.0) * cost.config.price
    torch.testing.assert_close(effects.alone(), alone, atol=1e-4, rtol=1e-3)
    assert int(effects.alone().argmax()) == PLANTED
    gain = cost.worth(flipped(mask, [moves[PLANTED]])) - cost.worth(mask[None])
    assert float(gain) > 0.5  # and the cost itself agrees


def test_caution_makes_harm_larger(cost: Cost) -> None:
    careless = flip_effects(cost, some_mask())
    cautious = careless.scaled()
    harmful = careless.gains(careless.clean_change, careless.triggered_change)[0] < -0.01
    assert bool(harmful.any())
    assert bool((cautious.alone()[harmful] < careless.alone()[harmful]).all())
    factors = torch.ones(CHANNELS, 2)
    factors[3, 0] = 2.0
    scaled = careless.scaled(factors)
    torch.testing.assert_close(scaled.clean_change[:, 3], 2 * careless.clean_change[:, 3])
    torch.testing.assert_close(scaled.triggered_change, careless.triggered_change)


def test_a_set_grows_by_what_adds_to_it(cost: Cost) -> None:
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    effects = flip_effects(cost, mask).scaled()
    pool = torch.arange(CHANNELS)
    grown = effects.grown(pool, 5)
    assert grown[0] == PLANTED
    assert len(set(grown)) == len(grown) <= 5
    assert effects.grown(pool[pool != PLANTED], 0) == []
    assert effects.grown(torch.empty(0, dtype=torch.int64), 3) == []
    moves = [torch.tensor(grown[:size]) for size in range(1, len(grown) + 1)]
    clean, hit = effects.together(columns(moves, CHANNELS))
    prices = torch.stack([effects.price[sites].sum() for sites in moves])
    found = (clean + hit + prices).tolist()
    assert found == sorted(found)


def test_a_twin_of_what_is_flipped_adds_nothing() -> None:
    """Two sites that each undo the trigger alone: one of them is enough, whatever each promises."""
    images = 4
    change = torch.zeros(images, 3)
    change[:, :2] = -20.0
    effects = Effects(
        clean=torch.full((images,), 8.0), clean_change=torch.zeros(images, 3),
        triggered=torch.full((images,), 8.0), triggered_change=change,
        sure=torch.ones(images), weight=torch.ones(images), price=torch.full((3,), -0.001),
    )  # fmt: skip
    alone = effects.alone()
    assert float(alone[0]) == float(alone[1]) > 3
    assert effects.grown(torch.arange(3), 3) == [0]


def test_an_image_that_is_turned_for_sure_still_tells_the_way_out() -> None:
    """No single flip brings the image back, so the cost, which is capped, sees nothing in it."""
    change = torch.zeros(1, 4)
    change[0, :3] = torch.tensor([-4.0, -3.0, -1.0])
    effects = Effects(
        clean=torch.full((1,), 8.0), clean_change=torch.zeros(1, 4),
        triggered=torch.full((1,), 12.0), triggered_change=change,
        sure=torch.ones(1), weight=torch.ones(1), price=torch.full((4,), -0.001),
    )  # fmt: skip
    assert effects.grown(torch.arange(4), 3) == [0, 1, 2]
