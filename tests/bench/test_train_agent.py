"""Training a policy: what is noted, what is kept on disk, what is kept out of a fold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.train_agent.__main__ import folds
from bench.train_agent.experience import Explorer, Lesson, load, save
from bench.train_agent.fitting import FittingConfig, fit, loss_on, untrained
from bench.zoo.checkpoints import ZooModel
from bench.zoo.recipes import CORE
from onp.agent.effects import CAUTION
from onp.agent.learner import Experience
from onp.config import AgentConfig
from onp.graph import NeuronGraph, build_graph
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, SIZE, a_state, toy


@pytest.fixture(scope="module")
def graph() -> NeuronGraph:
    model = toy()[0]
    return build_graph(trace(model, (3, SIZE, SIZE)), model)


def lesson_of(name: str, graph: NeuronGraph, seed: int) -> Lesson:
    """Sites with a certain feature do thrice the harm."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(CHANNELS, 6, generator=random)
    truth = torch.tensor(CAUTION).repeat(CHANNELS, 1)
    truth[features[:, 0] > 0, 0] *= 3
    met = []
    for number in range(8):
        state = a_state(CHANNELS, 100 * seed + number)
        moves = [torch.randperm(CHANNELS, generator=random)[:size] for size in (1, 2, 4)]
        gains = torch.stack(state.effects.scaled(truth).together(moves))
        met.append(Experience(state, moves, gains))
    return Lesson(name, features, met, graph)


def test_what_holds_for_all_networks_carries_over(graph: NeuronGraph) -> None:
    lessons = [lesson_of(str(seed), graph, seed) for seed in range(4)]
    agent, config = AgentConfig(hidden=16), FittingConfig(steps=150)
    before = loss_on(untrained(lessons, agent, 0), lessons[3:])
    assert loss_on(fit(lessons[:3], agent, config, 0), lessons[3:]) < 0.6 * before
    one, other = (fit(lessons[:1], agent, FittingConfig(steps=3), 5) for _ in range(2))
    assert torch.equal(one.embed.weight, other.embed.weight)


def test_a_lesson_comes_back(graph: NeuronGraph, tmp_path: Path) -> None:
    lesson = lesson_of("one", graph, 0)
    save(lesson, tmp_path / "l.pt")
    read = load(tmp_path / "l.pt", "one", graph)
    assert torch.equal(read.features, lesson.features)
    policy = untrained([lesson], AgentConfig(), 0)
    assert loss_on(policy, [read]) == pytest.approx(loss_on(policy, [lesson]), rel=1e-2)


def test_the_explorer_misjudges_and_takes_note() -> None:
    explorer, state = Explorer(CHANNELS, 0.5, 0), a_state(CHANNELS)
    factors = explorer.caution(state)
    assert not torch.equal(factors, explorer.caution(state))
    assert bool((factors > 0).all())
    explorer.learn(state, [torch.tensor([1])], torch.ones(2, 1))
    assert [len(one.moves) for one in explorer.met] == [1]


def test_every_network_is_kept_out_once_by_attack_and_once_by_kind(tmp_path: Path) -> None:
    networks = [ZooModel(recipe, {}, tmp_path) for recipe in CORE if recipe.attack != "clean"]
    names = sorted(network.name for network in networks)
    by_attack, by_kind = [], []
    for fold, kept_out in folds(networks).items():
        assert 0 < len(kept_out) < len(networks)
        (by_attack if fold.startswith("attacks") else by_kind).extend(kept_out)
    assert sorted(by_attack) == names
    assert sorted(by_kind) == names
