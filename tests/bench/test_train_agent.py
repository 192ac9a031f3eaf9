"""Teaching a policy: what holds for all networks carries over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ablations.setting import investigate, searched
from bench.train_agent.fitting import FittingConfig, fit
from bench.train_agent.lessons import Lesson
from onp import demo
from onp.agent.policy import PruningPolicy
from onp.agent.state import State
from onp.config import BUDGETS
from onp.graph import NeuronGraph, build_graph
from onp.suspect.load import load_suspect
from onp.suspect.trace import trace
from tests.agent.test_agent import CHANNELS, SIZE, toy


@pytest.fixture(scope="module")
def graph() -> NeuronGraph:
    model = toy()[0]
    return build_graph(trace(model, (3, SIZE, SIZE)), model)


class ToyLesson:
    """Gates of sites with a certain feature should close, all others stay open."""

    def __init__(self, graph: NeuronGraph, seed: int) -> None:
        self.search: Any = SimpleNamespace(graph=graph)
        random = torch.Generator().manual_seed(seed)
        self.features = torch.randn(CHANNELS, 6, generator=random)
        self.inputs = torch.randn(CHANNELS, State.INPUTS, generator=random)
        self.wanted = (self.features[:, 2] < 0).float()

    def closed(self, policy: PruningPolicy, known: Tensor | None = None) -> Tensor:
        features = self.features if known is None else self.features * known
        closed: Tensor = policy(self.search.graph, features, self.inputs)
        return closed

    def teacher(self, gates: Tensor, random: torch.Generator) -> Tensor:
        return (gates - self.wanted).square().mean()


@pytest.mark.parametrize("rounds", [0, 1])
def test_what_holds_for_all_networks_carries_over(graph: NeuronGraph, rounds: int) -> None:
    lessons: Any = [ToyLesson(graph, seed) for seed in range(9)]
    config = FittingConfig(steps=200, untold=0.1)
    policy = fit(lessons[:8], rounds=rounds, config=config, seed=0)
    closed = lessons[8].closed(policy)
    right = (closed > 0.5) == (lessons[8].wanted < 0.5)
    assert float(right.float().mean()) > 0.85
    short = FittingConfig(steps=3)
    one, other = (fit(lessons[:2], rounds=rounds, config=short, seed=5) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_lesson_is_told_by_one_look_and_judged_by_another() -> None:
    """On the demo's network: a mask that gates find on one draw helps on the other's triggers."""
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model.eval()
    looks = [
        searched(investigate(model, demo.clean_images(), BUDGETS["quick"], seed)) for seed in (0, 1)
    ]
    assert looks[0] is not None
    assert looks[1] is not None
    network: Any = None
    lesson = Lesson(network, 0, *looks)
    sites = looks[0].evaluator.trace.sites
    policy = PruningPolicy(lesson.features.shape[1], 3, rounds=1, seed=0)
    closed = lesson.closed(policy)
    assert closed.shape == (sites,)
    assert lesson.teacher(1 - closed, torch.Generator().manual_seed(0)).requires_grad
    nothing = lesson.worth(torch.zeros(sites))
    found = lesson.worth(lesson.adapted(torch.ones(sites), 12, 0.1))
    assert found > nothing + 0.3
