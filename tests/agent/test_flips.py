"""The search: what is foreseen, what the engine confirms, what is kept and given back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onp.agent.cost import WORTHLESS, Cost
from onp.agent.effects import Effects, flip_effects
from onp.agent.elite import Elite
from onp.agent.flips import flipped, give_back, improve
from onp.agent.learner import Learner
from onp.agent.state import State
from onp.clean import Clean
from onp.config import AgentConfig, CostConfig
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, PLANTED, SIZE, toy

REACHED = (1.0, 0.5)
"""Mean probability of its target that the cost is told each of its two probes adds."""


@pytest.fixture(scope="module")
def cost() -> Cost:
    model, images, labels, probe = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model, ledger=Ledger())
    seen = Clean.seen_by(evaluator, images, labels)
    return Cost(evaluator, seen, [probe, probe], CostConfig(), reached=REACHED)


def naive_worth(cost: Cost, gates: Tensor) -> float:
    """Minus cost and price of gates [S], written out image by image."""
    network, config = cost.evaluator.network, cost.config
    total = 0.0
    share = torch.empty(len(cost.images))
    for hand, reached in zip(cost.hands, REACHED, strict=True):
        share[hand] = reached
    for image, hit, label, wanted, reached in zip(
        cost.images, cost.triggered, cost.labels.tolist(), cost.wanted.tolist(), share.tolist(),
        strict=True,
    ):  # fmt: skip
        before = network(image[None])[0].log_softmax(0)
        after = network(image[None], gates)[0].log_softmax(0)
        triggered = network(hit[None], gates)[0].softmax(0)
        total += float(before[label] - after[label] + F.kl_div(after, before, log_target=True,
                                                                reduction="sum"))  # fmt: skip
        if wanted != label:
            excess = max(0.0, float(triggered[wanted] - after[wanted].exp()))
            weight = config.success_weight / math.sqrt(reached)
            total -= weight * math.log(1 - 0.98 * excess)
    return -total / len(cost.images) - config.price * float((1 - gates).sum())


def test_the_worth_is_its_formula(cost: Cost) -> None:
    masks = torch.zeros(3, CHANNELS, dtype=torch.bool)
    masks[1, PLANTED] = True
    masks[2, ::3] = True
    expected = [naive_worth(cost, (~mask).float()) for mask in masks]
    assert cost.worth(masks).tolist() == pytest.approx(expected, abs=1e-4)
    assert expected[1] > expected[0] + 0.5  # the repair is worth more than the backdoor


def test_a_mask_under_which_an_answer_is_no_number_is_worth_nothing(cost: Cost) -> None:
    masks = torch.zeros(2, CHANNELS, dtype=torch.bool)
    parts = cost.parts(masks)
    parts.harm[1, 3] = math.nan
    worths = cost.worth(masks, parts)
    assert worths[0] == cost.worth(masks[:1])[0]
    assert worths[1] == WORTHLESS
    elite = Elite(2)
    elite.offer(masks.flip(0) ^ torch.tensor([[True], [False]]), worths.flip(0))
    assert not elite.best.any()  # however early it was met


def test_the_planted_channel_is_found_from_nothing(cost: Cost) -> None:
    nothing = torch.zeros(1, CHANNELS, dtype=torch.bool)
    elite = Elite(4)
    elite.offer(nothing, cost.worth(nothing))
    rounds = improve(elite, cost, None, AgentConfig())
    assert elite.best[PLANTED]
    assert elite.worths[0] > float(cost.worth(nothing)) + 0.5
    assert rounds[-1].worth == elite.worths[0]
    assert float(Same(cost).worth(elite.best[None])) == pytest.approx(elite.worths[0], abs=1e-5)


class Recorder:
    """A learner that trusts the effects and notes what it is taught."""

    def __init__(self) -> None:
        self.lessons: list[tuple[Tensor, list[Tensor], Tensor]] = []

    def caution(self, state: State) -> Tensor:
        return torch.ones(len(state.inputs), 2)

    def learn(self, state: State, moves: list[Tensor], gains: Tensor) -> float:
        self.lessons.append((state.inputs[:, -1].bool(), moves, gains))
        return 0.0


def test_gains_are_taught_over_the_mask_that_moves_start_from(cost: Cost) -> None:
    elite, recorder = Elite(4), Recorder()
    start = torch.zeros(1, CHANNELS, dtype=torch.bool)
    start[0, 3] = True
    elite.offer(start, cost.worth(start))
    config = AgentConfig(first=1, most=2, little=-1.0, rounds=6)
    improve(elite, cost, cast("Learner", recorder), config)
    assert len({mask.numpy().tobytes() for mask, _, _ in recorder.lessons}) > 1  # the mask changed
    assert {len(moves[0]) for _, moves, _ in recorder.lessons} >= {1, 2}
    for mask, moves, gains in recorder.lessons:
        fresh = Same(cost)
        expected = fresh.parts(flipped(mask, moves)).gains(fresh.parts(mask[None]))
        torch.testing.assert_close(gains, expected, atol=1e-5, rtol=1e-4)


def test_what_need_not_be_pruned_is_given_back(cost: Cost) -> None:
    wide = torch.zeros(CHANNELS, dtype=torch.bool)
    wide[[1, 2, PLANTED, 11, 20]] = True
    slim = give_back(wide, cost, rounds=4)
    assert slim[PLANTED]
    assert int(slim.sum()) < int(wide.sum())
    assert float(cost.worth(slim[None])) > float(cost.worth(wide[None]))
    assert not bool((slim & ~wide).any())
    empty = torch.zeros(CHANNELS, dtype=torch.bool)
    assert torch.equal(give_back(empty, cost, rounds=2), empty)


class Linear:
    """Worth = weights of the pruned sites; the effects are told wrongly where ``lies`` says so."""

    device = torch.device("cpu")

    def __init__(
        self, weights: list[float], lies: list[float] | None = None, trusts: bool = False
    ) -> None:
        self.trusts_gradients = trusts
        self.seen: list[list[int]] = []
        """Sites of the masks whose effects were taken."""
        self.weights = torch.tensor(weights)
        self.lies = self.weights if lies is None else torch.tensor(lies)
        self.sites = len(weights)
        self.asked: list[Tensor] = []

    def parts(self, masks: Tensor) -> Told:
        self.asked.append(masks)
        return Told(self, masks[0])

    def worth(self, masks: Tensor, parts: Told) -> Tensor:
        return masks.float() @ self.weights


class Told(Effects):
    """Effects of ``Linear``'s flips as it tells them; stands for the parts of the cost as well."""

    def __init__(self, cost: Linear, mask: Tensor) -> None:
        told, nothing = torch.where(mask, -cost.lies, cost.lies), torch.zeros(1, cost.sites)
        one = torch.zeros(1)
        super().__init__(one, told[None], one, nothing, one, one, nothing[0])

    def gains(self, *changes: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return (changes[0].sum(0), changes[1].sum(0)) if changes else (self.clean, self.clean)

    def scaled(self, caution: Tensor | None = None) -> Told:
        return self


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    def effects(cost: Linear, mask: Tensor) -> Told:
        cost.seen.append(mask.nonzero()[:, 0].tolist())
        return Told(cost, mask)

    monkeypatch.setattr("onp.agent.flips.flip_effects", effects)


def _improved(worth: Linear, config: AgentConfig) -> tuple[Elite, list[list[int]], list[float]]:
    """What the search ends with, the sites of every round's set, and what it brought."""
    elite = Elite(4)
    elite.offer(torch.zeros(1, worth.sites, dtype=torch.bool), torch.zeros(1))
    rounds = improve(elite, cast("Cost", worth), None, config)
    assert [len(masks) for masks in worth.asked] == [1] * len(rounds)  # one mask a round
    asked = [masks[0].nonzero()[:, 0].tolist() for masks in worth.asked]
    return elite, asked, [log.gain for log in rounds]


@pytest.mark.usefixtures("told")
def test_flips_that_help_are_taken_together() -> None:
    elite, asked, gains = _improved(Linear([0.1, 0.2, -0.3, 0.4]), AgentConfig())
    assert elite.best.tolist() == [True, True, False, True]
    assert asked == [[0, 1, 3]]  # and then nothing promises anything
    assert gains == pytest.approx([0.7])


@pytest.mark.usefixtures("told")
def test_a_set_that_helps_makes_the_next_one_larger() -> None:
    worth = Linear([0.01 * (n + 1) for n in range(9)])
    elite, asked, _ = _improved(worth, AgentConfig(first=1, most=3))
    assert bool(elite.best.all())
    assert asked == [[8], [6, 7, 8], [3, 4, 5, 6, 7, 8], list(range(9))]  # of 1, 2, 3 and 3 sites


@pytest.mark.usefixtures("told")
def test_a_set_that_does_harm_makes_the_next_one_smaller() -> None:
    worth = Linear([-2.0, 0.6, 0.6, 0.6], lies=[0.1, 0.6, 0.5, 0.4])
    elite, asked, gains = _improved(worth, AgentConfig(first=4))
    # 4, a third of it, twice that; then what is left has a set to itself, and then it is harmful
    assert asked == [[0, 1, 2, 3], [1], [1, 2, 3], [0, 1, 2, 3]]
    assert gains[:3] == pytest.approx([-0.2, 0.6, 1.2])
    assert elite.best.tolist() == [False, True, True, True]


@pytest.mark.usefixtures("told")
def test_effects_are_taken_ahead_while_sets_help() -> None:
    """Once for each mask that the search goes on from, and of one that did harm."""
    weights, lies = [-2.0, 0.6, 0.6, 0.6, 0.3], [0.1, 0.6, 0.5, 0.4, 0.3]
    config = AgentConfig(first=2, most=2, patience=2)
    plain, ahead = Linear(weights, lies), Linear(weights, lies, trusts=True)
    results = [_improved(worth, config) for worth in (plain, ahead)]
    assert torch.equal(results[0][0].best, results[1][0].best)
    assert results[0][1:] == results[1][1:]
    assert ahead.asked[2][0].tolist() == [True] * 5  # harm
    assert plain.seen == [[], [1, 2], [1, 2, 3, 4]]
    assert ahead.seen == [[], [1, 2], [1, 2, 3, 4], [0, 1, 2, 3, 4]]

    few = replace(config, rounds=2)  # nothing follows the last round
    worth = Linear(weights, lies, trusts=True)
    _improved(worth, few)
    assert worth.seen == [[], [1, 2]]
    shy = Linear([-2.0, 0.6, 0.6, 0.6], lies=[0.1, 0.6, 0.5, 0.4], trusts=True)
    _, asked, _ = _improved(shy, AgentConfig(first=4))  # harm, help, help, harm
    assert asked == [[0, 1, 2, 3], [1], [1, 2, 3], [0, 1, 2, 3]]
    assert shy.seen == [[], [0, 1, 2, 3], [1], [1, 2, 3], [0, 1, 2, 3]]


def test_a_search_that_looks_ahead_ends_the_same_for_less(cost: Cost) -> None:
    found = []
    for trusts in (True, False):
        fresh = Untrusting(cost) if not trusts else Same(cost)
        elite = Elite(4)
        nothing = torch.zeros(1, CHANNELS, dtype=torch.bool)
        elite.offer(nothing, fresh.worth(nothing))
        before = cost.evaluator.ledger.total
        rounds = improve(elite, fresh, None, AgentConfig(first=2, most=4))
        found.append((elite, rounds, cost.evaluator.ledger.total - before))
    (ahead, short, less), (plain, long, more) = found
    assert torch.equal(ahead.best, plain.best)
    assert [log.flips for log in short] == [log.flips for log in long]
    assert [log.worth for log in short] == pytest.approx([log.worth for log in long], abs=1e-4)
    assert sum(log.gain > 0 for log in short) > 1
    assert less < more


def test_what_a_gradient_saw_is_what_the_engine_says(cost: Cost) -> None:
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    mask[[0, 7, PLANTED]] = True
    told, asked = Same(cost), Same(cost)
    flip_effects(told, mask)
    before = cost.evaluator.ledger.total
    seen = told.parts(mask[None])
    assert cost.evaluator.ledger.total == before
    wanted = asked.parts(mask[None])
    assert cost.evaluator.ledger.total > before
    for name in ("harm", "success", "turned"):
        torch.testing.assert_close(getattr(seen, name), getattr(wanted, name), atol=1e-5, rtol=1e-4)


def test_what_the_engine_said_stands(cost: Cost) -> None:
    """A gate of 0 leaves what is no number; a mask cuts it off."""
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    mask[[5, PLANTED]] = True
    told = Same(cost)
    parts = told.parts(mask[None])
    told.saw(mask, torch.zeros_like(cost.original), torch.zeros_like(cost.original))
    assert torch.equal(told.parts(mask[None]).harm, parts.harm)

    fresh = Same(cost)
    logits = torch.zeros_like(cost.original)
    logits[4, 0] = math.nan
    fresh.saw(mask, logits, logits)
    assert not fresh.told
    assert torch.equal(fresh.parts(mask[None]).harm, parts.harm)


def test_a_rougher_engine_is_asked_itself(cost: Cost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.evaluator, "rough_plan", cost.evaluator.plan)
    monkeypatch.setattr(cost.evaluator, "_rough_precision", "int8")
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    mask[3] = True
    told = Same(cost)
    assert not told.trusts_gradients
    flip_effects(told, mask)
    assert not told.told


class Same(Cost):
    """The cost with nothing told."""

    def __init__(self, cost: Cost) -> None:
        self.__dict__.update(cost.__dict__)
        self.told = {}


class Untrusting(Same):
    trusts_gradients = False  # type: ignore[assignment]


@pytest.mark.usefixtures("told")
def test_rounds_that_bring_next_to_nothing_end_it() -> None:
    worth = Linear([0.5] + [0.001] * 9)
    _, _, gains = _improved(worth, AgentConfig(first=1, most=1, patience=3))
    assert gains == pytest.approx([0.5, 0.001, 0.001, 0.001], abs=1e-6)
    _, asked, _ = _improved(Linear([-1.0, -1.0], lies=[1.0, 2.0]), AgentConfig(patience=2))
    assert asked == [[0, 1], [1]]
    _, asked, _ = _improved(Linear([-1.0, -1.0], lies=[1.0, 2.0]), AgentConfig(patience=9))
    assert asked == [[0, 1], [1], [0]]  # nor is a flip that does harm tried again


@pytest.mark.usefixtures("told")
def test_what_is_not_a_number_is_left_out() -> None:
    worth = Linear([0.1, 0.2, -0.3], lies=[0.1, math.nan, -0.3])
    elite, asked, _ = _improved(worth, AgentConfig())
    assert asked == [[0]]
    assert elite.best.tolist() == [True, False, False]


@pytest.mark.usefixtures("told")
def test_nothing_that_promises_anything_is_no_error() -> None:
    elite, asked, _ = _improved(Linear([-1.0, -1.0]), AgentConfig())
    assert not elite.best.any()
    assert asked == []


def test_moves_flip_their_sites() -> None:
    mask = torch.tensor([True, False, False])
    moves = [torch.tensor([2, 0]), torch.tensor([2, 0, 1])]
    assert flipped(mask, moves).tolist() == [[False, False, True], [False, True, True]]
    assert flipped(mask, []).shape == (0, 3)
    assert mask.tolist() == [True, False, False]
