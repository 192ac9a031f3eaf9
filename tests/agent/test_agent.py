"""The agent on a toy network with a planted backdoor channel: what it values, what it learns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.learner import Learner
from onp.agent.objective import Objective
from onp.agent.policy import UNIT, FlipPolicy, State
from onp.config import AgentConfig, ScoreConfig
from onp.evaluate import MaskEvaluator
from onp.graph import build_graph
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


def policy_of(traced: Trace, model: nn.Module, features: Tensor, *, rounds: int = 1) -> FlipPolicy:
    return FlipPolicy(build_graph(traced, model), features, hidden=16, rounds=rounds, seed=3)


def a_state(sites: int, seed: int = 0) -> State:
    random = torch.Generator().manual_seed(seed)
    pruned = torch.rand(sites, generator=random) < 0.2
    inputs = torch.randn(sites, State.INPUTS, generator=random)
    inputs[:, -1] = pruned.float()
    return State(inputs, 0.01 * torch.randn(sites, generator=random))


def test_before_learning_flips_are_worth_what_is_foreseen(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, _, model = planted
    policy = policy_of(traced, model, torch.randn(CHANNELS, 6))
    state = a_state(CHANNELS)
    values = Learner(policy, AgentConfig(), seed=0).values(state)
    torch.testing.assert_close(values, torch.asinh(state.foreseen / UNIT))


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_the_agent_learns_what_the_model_does_not_foresee(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module], rounds: int
) -> None:
    """Flips of sites with a certain feature turn out to do harm; it is told of half of them."""
    traced, _, _, model = planted
    random = torch.Generator().manual_seed(1)
    features = torch.randn(CHANNELS, 6, generator=random)
    features[:, 0] = (torch.arange(CHANNELS) % 2).float()
    policy = policy_of(traced, model, features, rounds=rounds)
    learner = Learner(policy, AgentConfig(learning_rate=0.01), seed=0)
    told = torch.arange(CHANNELS // 2)
    losses = []
    for number in range(25):
        state = a_state(CHANNELS, number)
        gains = state.foreseen - 0.05 * features[:, 0]
        losses.append(learner.learn(state, told, gains[told]))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    state = a_state(CHANNELS, 99)
    surprise = learner.values(state) - torch.asinh(state.foreseen / UNIT)
    unseen = torch.arange(CHANNELS // 2, CHANNELS)
    odd = features[unseen, 0] == 1
    assert float(surprise[unseen][odd].mean()) < float(surprise[unseen][~odd].mean()) - 1


def test_without_steps_the_agent_keeps_to_what_is_foreseen(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, _, model = planted
    learner = Learner(
        policy_of(traced, model, torch.randn(CHANNELS, 6)), AgentConfig(steps=0), seed=0
    )
    state = a_state(CHANNELS)
    before = learner.values(state)
    assert learner.learn(state, torch.arange(5), -torch.ones(5)) == 0
    torch.testing.assert_close(learner.values(state), before, rtol=0, atol=0)
    assert learner.learn(state, torch.arange(0), torch.ones(0)) == 0  # nothing was tried


def test_the_policy_follows_a_permutation_of_channels() -> None:
    """Channels of a layer have no order: permuted with their weights, their values are permuted."""
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
    results = []
    for network, moved in ((model, torch.arange(traced.sites)), (other, places)):
        policy = policy_of(trace(network, (3, SIZE, SIZE)), network, features[moved], rounds=2)
        seen = [State(s.inputs[moved], s.foreseen[moved]) for s in states]
        with torch.no_grad():
            policy.value.weight.normal_(generator=torch.Generator().manual_seed(0))
            results.append(policy(seen))
    values, permuted = results
    torch.testing.assert_close(permuted, values[:, places], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(permuted, values, atol=1e-2)


def test_same_seed_same_agent(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, _, model = planted
    results = []
    for _ in range(2):
        torch.rand(1)  # the global state does not matter
        learner = Learner(policy_of(traced, model, torch.ones(CHANNELS, 2)), AgentConfig(), seed=5)
        for number in range(5):
            learner.learn(a_state(CHANNELS, number), torch.arange(4), torch.full((4,), 0.05))
        results.append(learner.values(a_state(CHANNELS, 7)))
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.asinh(a_state(CHANNELS, 7).foreseen / UNIT))
