"""Networks that a policy is taught on, or judged by: what stays the same between its steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.ablations.setting import search_of
from bench.zoo.checkpoints import ZooModel
from bench.zoo.datasets import load
from onp.agent.gates import learn_gates
from onp.agent.policy import PruningPolicy
from onp.agent.relaxed import RelaxedCost
from onp.search import Search

IMAGES_PER_STEP = 16
"""Clean ones, and as many triggered, in a step of teaching."""


class Lesson:
    """A network that was called backdoored: what the policy is told of it, from a short look at one
    draw of clean images, and what teaches and judges it, from a longer look at another draw. So it
    learns what a short look misses. True triggers are not seen."""

    def __init__(self, network: ZooModel, seed: int, told: Search, better: Search) -> None:
        """told, better: the same network's; ``seed`` drew the first one's images."""
        self.network, self.seed, self.search = network, seed, told
        self.counted = counted = told.evidence.counted
        self.features = told.features(counted, torch.zeros(told.evaluator.trace.sites))
        """float32 [S, F]."""
        with torch.enable_grad():
            self.inputs = told.nothing_pruned(counted).inputs
        """Of the network as it came, float32 [S, INPUTS]."""
        self.relaxed: RelaxedCost = told.relaxed(counted)
        """What gates cost in a repair that was told so much."""
        self.cost = told.cost(counted, slice(told.config.agent.images))
        taught = better.relaxed(better.evidence.counted)
        self.teacher = RelaxedCost(
            better.evaluator.network, better.clean, taught.probes, taught.response,
            replace(better.config.gates, images_per_step=IMAGES_PER_STEP),
        )  # fmt: skip
        """What teaches."""
        self.judge = better.cost(better.evidence.counted, slice(None))

    def closed(self, policy: PruningPolicy, known: Tensor | None = None) -> Tensor:
        """What a policy proposes, float32 [S]; ``known`` [F] is 0 for features that it is not
        told."""
        features = self.features if known is None else self.features * known
        closed: Tensor = policy(self.search.graph, features, self.inputs)
        return closed

    def adapted(self, start: Tensor, steps: int, learning_rate: float) -> Tensor:
        """How far gates that begin at ``start`` float32 [S] close in so many steps."""
        with torch.enable_grad():
            return learn_gates(
                self.relaxed, start, steps=steps, learning_rate=learning_rate, seed=self.seed,
                ledger=self.search.evaluator.ledger,
            )  # fmt: skip

    def worth(self, ranking: Tensor) -> float:
        """What the judge thinks of the first mask that a repair would think best, of those that
        closed gates float32 [S] give."""
        masks = self.search.first_masks(self.counted, ranking)
        best = int(self.cost.worth(masks).argmax())
        return float(self.judge.worth(masks[best : best + 1]))


@dataclass(frozen=True)
class Looks:
    """What lessons are made from."""

    seeds: Sequence[int]
    """Draws of clean images that the policy is told of, one lesson each;"""
    budget: str
    """how long the look at them is."""
    teaching_seed: int
    """The draw that teaches and judges, at the standard budget."""
    samples: int
    """Clean images in a draw."""
    data: Path | None
    work: Path
    """Folder that evidence is kept in, so that a call can be interrupted."""


def lessons_of(networks: Sequence[ZooModel], looks: Looks) -> list[Lesson]:
    """Of every network where all looks call the same backdoor."""
    sets = {n.recipe.dataset for n in networks}
    images = {name: load(name, looks.data, "train") for name in sets}
    lessons = []
    for network in networks:
        own = images[network.recipe.dataset]

        def look(seed: int, budget: str, network=network, own=own) -> Search | None:
            return search_of(network, own, looks.samples, seed, looks.work, budget)

        better = look(looks.teaching_seed, "standard")
        if better is None:
            print(f"{network.name}: no backdoor found, left out", file=sys.stderr, flush=True)
        for seed in looks.seeds if better is not None else ():
            told = look(seed, looks.budget)
            same = told is not None and (
                set(told.evidence.verdict.targets) == set(better.evidence.verdict.targets)
            )
            if same:
                lessons.append(Lesson(network, seed, told, better))
            found = "ready" if same else "another class or none, left out"
            print(f"{network.name} seed {seed}: {found}", file=sys.stderr, flush=True)
    return lessons
