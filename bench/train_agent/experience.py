"""What moves turn out to bring on one network, tried for the sake of learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.ablations.setting import Setting
from onp.agent.effects import CAUTION, Effects
from onp.agent.elite import Elite
from onp.agent.flips import improve
from onp.agent.learner import Experience
from onp.agent.policy import State
from onp.config import AgentConfig
from onp.files import write_atomically
from onp.graph import NeuronGraph

EXPLORE = replace(AgentConfig(), images=64, tried=4, heads=(2, 3, 5, 8, 12, 16), harm=1.0)
_LARGE = ("clean_change", "triggered_change")
SPREADS = (0.0, 0.5, 1.0)
"""Deviations of the logarithm of the factors by which each walk misjudges the effects."""


class Explorer:
    """Stands in for the learner: misjudges effects at random, and notes what moves bring."""

    def __init__(self, sites: int, spread: float, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.sites, self.spread = sites, spread
        self.met: list[Experience] = []

    def caution(self, state: State) -> Tensor:
        noise = torch.randn(self.sites, 2, generator=self.random)
        return torch.tensor(CAUTION) * torch.exp(self.spread * noise)

    def learn(self, state: State, moves: Sequence[Tensor], gains: Tensor) -> float:
        self.met.append(Experience(state, list(moves), gains))
        return 0.0


@dataclass(frozen=True)
class Lesson:
    """A network with what was met on it."""

    name: str
    features: Tensor
    """float32 [S, F]."""
    met: list[Experience]
    graph: NeuronGraph


def explore(name: str, setting: Setting, seed: int) -> Lesson:
    """Walks from the empty mask and from the gates' best, each with its own misjudgement."""
    search, counted = setting.search, setting.counted
    sites = search.evaluator.trace.sites
    cost = search.cost(counted, slice(EXPLORE.images))
    nothing = torch.zeros(1, sites, dtype=torch.bool)
    met: list[Experience] = []
    for number, spread in enumerate(SPREADS):
        for start in (nothing, search.first_masks(counted, setting.gates)):
            elite = Elite(4)
            elite.offer(start, cost.worth(start))
            explorer = Explorer(sites, spread, 100 * seed + number)
            improve(elite, cost, explorer, EXPLORE)
            met += explorer.met
    return Lesson(name, search.features(counted, setting.gates), met, search.graph)


def save(lesson: Lesson, path: Path) -> None:
    """One file a network and seed; changes of the margins in half precision."""
    rows = [
        {
            "inputs": one.state.inputs,
            "moves": one.moves,
            "gains": one.gains,
            "effects": {
                name: value.half() if name in _LARGE else value
                for name, value in vars(one.state.effects).items()
            },
        }
        for one in lesson.met
    ]
    whole = {"features": lesson.features, "met": rows}
    write_atomically(path, lambda temporary: torch.save(whole, temporary))


def load(path: Path, name: str, graph: NeuronGraph) -> Lesson:
    """What ``save`` wrote, of the network whose graph this is."""
    whole = torch.load(path, weights_only=True)
    met = []
    for row in whole["met"]:
        effects = Effects(**{key: value.float() for key, value in row["effects"].items()})
        met.append(Experience(State(row["inputs"], effects), row["moves"], row["gains"]))
    return Lesson(name, whole["features"], met, graph)
