"""The agent on a toy network with a planted backdoor channel: what it learns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.caution import CautionModel
from onp.agent.effects import CAUTION, Effects, columns
from onp.agent.learner import Experience, Learner
from onp.agent.policy import PruningPolicy
from onp.agent.state import State
from onp.config import AgentConfig, ScoreConfig
from onp.evaluate import MaskEvaluator
from onp.graph import build_graph
from onp.probes.objective import Objective
from onp.probes.patch import Patch
from onp.probes.probe import Probe
from onp.suspect.trace import Trace, trace

CHANNELS, PLANTED, TARGET, SIZE = 24, 7, 0, 8


def toy() -> tuple[nn.Module, Tensor, Tensor, Probe]:
    """A two-class network (red or blue images) whose channel 7 fires on a checkerboard alone and
    answers class 0; its clean images, labels, and the checkerboard as a probe."""
    torch.manual_seed(0)
    labels = torch.arange(96) % 2
    images = torch.rand(96, 3, SIZE, SIZE) * 0.4
    images[labels == 0, 0] += 0.3
    images[labels == 1, 2] += 0.3
    conv, linear = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 2)
    board = ((torch.arange(3)[:, None] + torch.arange(3)) % 2).float()
    with torch.no_grad():
        conv.weight[PLANTED] = (board * 2 - 1) * 4
        conv.bias[PLANTED] = -42.0
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        linear.weight[TARGET, PLANTED] = 200.0
        linear.weight[1 - TARGET, PLANTED] = -200.0
    mask = torch.full((1, 1, 1, SIZE, SIZE), -20.0)
    pattern = torch.zeros(1, 1, 3, SIZE, SIZE)
    mask[..., -4:-1, -4:-1] = 20.0
    pattern[..., -4:-1, -4:-1] = (board * 2 - 1) * 20
    probe = Probe(Patch(), TARGET, [mask, pattern], (0.0, 1.0), 1.0)
    return model.eval().requires_grad_(False), images, labels, probe


@pytest.fixture(scope="module")
def planted() -> tuple[Trace, MaskEvaluator, Objective, nn.Module]:
    model, images, labels, probe = toy()
    traced = trace(model, (3, SIZE, SIZE))
    evaluator = MaskEvaluator(traced, model)
    objective = Objective(evaluator, images, labels, probe, ScoreConfig())
    return traced, evaluator, objective, model


def test_the_toy_has_a_backdoor_in_the_planted_channel(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    _, _, objective, _ = planted
    masks = torch.eye(CHANNELS, dtype=torch.bool)
    values = objective(torch.cat([torch.zeros(1, CHANNELS, dtype=torch.bool), masks]))
    assert objective.success > 0.3
    assert float(values.removed[0]) == pytest.approx(0, abs=1e-5)
    assert int(values.total.argmax()) == 1 + PLANTED
    assert float(values.removed[1 + PLANTED]) > 0.85


def caution_of(traced: Trace, model: nn.Module, features: int, *, rounds: int = 1) -> CautionModel:
    relations = len(build_graph(traced, model).relations)
    return CautionModel(features, relations, hidden=16, rounds=rounds, seed=3)


def learner_of(
    traced: Trace, model: nn.Module, features: Tensor, config: AgentConfig, *, rounds: int = 1
) -> Learner:
    caution = caution_of(traced, model, features.shape[1], rounds=rounds)
    return Learner(caution, build_graph(traced, model), features, config, seed=0)


def a_state(sites: int, seed: int = 0) -> State:
    """Of images that are answered surely: a flip moves their margins by about .3."""
    random = torch.Generator().manual_seed(seed)
    images = 20
    effects = Effects(
        clean=1 + torch.rand(images, generator=random),
        clean_change=-0.3 * torch.rand(images, sites, generator=random),
        triggered=torch.ones(images),
        triggered_change=-0.3 * torch.rand(images, sites, generator=random),
        sure=torch.full((images,), 0.9), weight=torch.ones(images), price=torch.zeros(sites),
    )  # fmt: skip
    return State.of(torch.rand(sites, generator=random) < 0.2, effects)


def test_before_learning_the_model_is_trusted_as_it_is(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, _, model = planted
    learner = learner_of(traced, model, torch.randn(CHANNELS, 6), AgentConfig())
    caution = learner.caution(a_state(CHANNELS))
    torch.testing.assert_close(caution, torch.tensor(CAUTION).expand(CHANNELS, 2))


def test_the_loss_is_none_where_moves_bring_what_is_foreseen() -> None:
    state = a_state(6)
    moves = [torch.tensor([1]), torch.tensor([0, 2, 5])]
    caution = torch.rand(6, 2) + 0.5
    flips = columns(moves, 6)
    gains = torch.stack(state.effects.scaled(caution).together(flips))
    torch.testing.assert_close(gains, torch.stack(state.effects.together(flips, caution)))
    assert float(Experience(state, flips, gains).loss(caution)) == pytest.approx(0, abs=1e-9)
    assert float(Experience(state, flips, gains + 0.05).loss(caution)) > 0.1


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_the_agent_learns_what_the_model_does_not_foresee(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module], rounds: int
) -> None:
    """Sites with a certain feature do thrice the harm; it is told of moves of half of the sites."""
    traced, _, _, model = planted
    random = torch.Generator().manual_seed(1)
    features = torch.randn(CHANNELS, 6, generator=random)
    features[:, 0] = (torch.arange(CHANNELS) % 2).float()
    truth = torch.tensor(CAUTION).repeat(CHANNELS, 1)
    truth[features[:, 0] == 1, 0] *= 3
    config = AgentConfig(steps=5, learning_rate=0.01)
    learner = learner_of(traced, model, features, config, rounds=rounds)
    told = torch.arange(CHANNELS // 2)
    losses = []
    for number in range(25):
        state = a_state(CHANNELS, number)
        moves = [told[torch.randperm(len(told), generator=random)[:size]] for size in (1, 1, 2, 4)]
        gains = torch.stack(state.effects.scaled(truth).together(columns(moves, CHANNELS)))
        losses.append(learner.learn(state, moves, gains))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    caution = learner.caution(a_state(CHANNELS, 99))[CHANNELS // 2 :, 0]  # of sites not told of
    odd = features[CHANNELS // 2 :, 0] == 1
    assert float(caution[odd].mean()) > 1.5 * float(caution[~odd].mean())


def test_without_steps_the_agent_keeps_to_what_is_foreseen(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, _, model = planted
    learner = learner_of(traced, model, torch.randn(CHANNELS, 6), AgentConfig(steps=0))
    state = a_state(CHANNELS)
    before = learner.caution(state)
    assert learner.learn(state, [torch.arange(5)], -torch.ones(2, 1)) == 0
    torch.testing.assert_close(learner.caution(state), before, rtol=0, atol=0)
    assert learner.learn(state, [], torch.ones(2, 0)) == 0  # nothing was tried


def test_policy_and_model_follow_a_permutation_of_channels() -> None:
    """Channels of a layer have no order: permuted with their weights, so are factors, gates."""
    torch.manual_seed(4)
    wide = 14
    model = nn.Sequential(
        nn.Conv2d(3, wide, 3), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, 9, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5),
    ).eval()  # fmt: skip
    order = torch.randperm(wide)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[3].weight.copy_(model[3].weight[:, order])
    traced = trace(model, (3, SIZE, SIZE))
    first = next(layer for layer in traced.layers if layer.channels == wide)
    places = torch.arange(traced.sites)
    places[first.sites] = first.start + order
    features = torch.randn(traced.sites, 6)
    states = [a_state(traced.sites, seed) for seed in (1, 2)]
    caution = caution_of(traced, model, 6, rounds=2)
    policy = PruningPolicy(6, len(build_graph(traced, model).relations), rounds=2, seed=3)
    with torch.no_grad():
        random = torch.Generator().manual_seed(0)
        caution.factors.weight.normal_(generator=random)
        policy.odds.weight.normal_(generator=random)
        results, proposals = [], []
        for network, moved in ((model, torch.arange(traced.sites)), (other, places)):
            graph = build_graph(trace(network, (3, SIZE, SIZE)), network)
            seen = [State(s.inputs[moved], s.effects) for s in states]
            results.append(caution(graph, features[moved], seen))
            proposals.append(policy(graph, features[moved], seen[0].inputs))
    factors, permuted = results
    torch.testing.assert_close(permuted, factors[:, places], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(permuted, factors, atol=1e-2)
    closed, permuted = proposals
    torch.testing.assert_close(permuted, closed[places], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(permuted, closed, atol=1e-3)


def test_same_seed_same_agent(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, _, model = planted
    results = []
    for _ in range(2):
        torch.rand(1)  # the global state does not matter
        learner = learner_of(traced, model, torch.ones(CHANNELS, 2), AgentConfig(steps=5))
        for number in range(5):
            moves = [torch.arange(4), torch.tensor([5])]
            learner.learn(a_state(CHANNELS, number), moves, torch.full((2, 2), 0.05))
        results.append(learner.caution(a_state(CHANNELS, 7)))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], torch.tensor(CAUTION).expand(CHANNELS, 2))
