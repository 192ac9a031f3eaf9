"""The agent on a toy network with a planted backdoor channel: it must find it, by learning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.agent.elite import Elite
from onp.agent.env import Observation, PruningEnv
from onp.agent.objective import Objective
from onp.agent.policy import PruningPolicy, flip_prior
from onp.agent.ppo import optimise
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


def test_reward_rises_while_the_agent_learns(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, objective, model = planted
    config = AgentConfig(updates=40, copies=32, steps=1, learning_rate=0.01, entropy_weight=0.0)
    random = torch.Generator().manual_seed(1)
    features = torch.randn(CHANNELS, 6, generator=random)  # tell channels apart, say nothing
    policy = PruningPolicy(
        build_graph(traced, model), features, torch.full((CHANNELS,), -2.5),
        hidden=16, rounds=2, generator=random,
    )  # fmt: skip
    env = PruningEnv(lambda masks: objective(masks).total, CHANNELS, 32, 1)

    class Empty(Elite):
        """Every episode starts from nothing, so that only the policy can raise the reward."""

        @property
        def best(self) -> Tensor:
            return torch.zeros(CHANNELS, dtype=torch.bool)

    elite = Empty(4)
    elite.offer(elite.best[None], torch.zeros(1))
    logs = optimise(env, policy, elite, config, seed=0)
    rewards = torch.tensor([log.reward for log in logs])
    early, late = float(rewards[:10].mean()), float(rewards[-10:].mean())
    assert late > early + 0.3, f"mean reward {early:.3f} -> {late:.3f}"
    assert logs[-1].entropy < logs[0].entropy
    assert elite.masks[0][PLANTED]
    with torch.no_grad():
        logits, _ = policy(env.reset(elite.best)[0])
    assert float(logits[0, PLANTED]) > 0  # it started at -2.5


def test_the_environment_keeps_its_contract() -> None:
    weights = torch.linspace(-1, 1, 5)
    env = PruningEnv(lambda masks: masks.float() @ weights, 5, copies=3, steps=2)
    start = torch.tensor([True, False, False, False, False])
    state, info = env.reset(start)
    assert state.pruned.shape == (3, 5)
    assert info == {}
    flips = torch.zeros(3, 5, dtype=torch.bool)
    flips[1, 0] = flips[2, 4] = True
    state, reward, terminated, truncated, info = env.step(flips)
    torch.testing.assert_close(reward, torch.tensor([0.0, 1.0, 1.0]))
    assert (terminated, truncated) == (False, False)
    assert info["flips"].tolist() == [0, 1, 1]
    _, _, terminated, truncated, _ = env.step(flips)
    assert (terminated, truncated) == (False, True)
    assert env.evaluations == 1 + 3 + 3
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(flips)
    env.reset(start)
    with pytest.raises(ValueError, match=r"flips must be bool \[3, 5\]"):
        env.step(flips[:2])


def test_the_prior_flips_as_many_sites_as_asked_near_the_cut() -> None:
    ranking = torch.rand(500, generator=torch.Generator().manual_seed(0))
    prior = flip_prior(ranking, 10, expected_flips=3.0)
    inside = torch.zeros(500, dtype=torch.bool)
    inside[ranking.argsort(descending=True)[:10]] = True
    odds = torch.where(inside, -prior, prior).sigmoid()
    assert float(odds.sum()) == pytest.approx(3.0, abs=0.01)
    order = ranking.argsort(descending=True)
    assert float(odds[order[10]]) > 5 * float(odds[order[100]])
    assert float(odds[order[9]]) > float(odds[order[0]])


def test_the_policy_follows_a_permutation_of_channels() -> None:
    """Channels of a layer have no order: permuted with their weights, their logits are permuted."""
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
    prior = torch.randn(traced.sites)
    pruned = torch.rand(2, traced.sites) < 0.2
    results = []
    for network, moved in ((model, torch.arange(traced.sites)), (other, places)):
        random = torch.Generator().manual_seed(0)
        policy = PruningPolicy(
            build_graph(trace(network, (3, SIZE, SIZE)), network), features[moved], prior[moved],
            hidden=16, rounds=2, generator=random,
        )  # fmt: skip
        with torch.no_grad():
            policy.flip.weight.normal_(generator=random)
            policy.value.weight.normal_(generator=random)
            logits, value = policy(Observation(pruned[:, moved], torch.zeros(2), 1))
        results.append((logits, value))
    (logits, value), (permuted, same) = results
    torch.testing.assert_close(permuted, logits[:, places], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same, value, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(permuted, logits, atol=1e-2)


def test_same_seed_same_masks(
    planted: tuple[Trace, MaskEvaluator, Objective, nn.Module],
) -> None:
    traced, _, objective, model = planted
    results = []
    for _ in range(2):
        random = torch.Generator().manual_seed(3)
        policy = PruningPolicy(
            build_graph(traced, model), torch.ones(CHANNELS, 2), torch.full((CHANNELS,), -2.0),
            hidden=8, rounds=1, generator=random,
        )  # fmt: skip
        env = PruningEnv(lambda masks: objective(masks).total, CHANNELS, 8, 2)
        elite = Elite(4)
        elite.offer(torch.zeros(1, CHANNELS, dtype=torch.bool), torch.zeros(1))
        optimise(env, policy, elite, AgentConfig(updates=3, copies=8, steps=2), seed=5)
        results.append(torch.stack(elite.masks))
    assert torch.equal(*results)
