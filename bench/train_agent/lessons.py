"""Networks that a policy is taught on, or judged by: what stays the same between its steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
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
"""Clean ones, and as many triggered, in a step of fitting."""
JUDGED_BY = slice(128)
"""Images that proposed masks are judged by: those of the search."""


class Lesson:
    """A network that was called backdoored, with one draw of clean images and the triggers that
    were synthesised on them. The true one is not seen."""

    def __init__(self, network: ZooModel, seed: int, search: Search) -> None:
        self.network, self.seed, self.search = network, seed, search
        self.counted = counted = search.evidence.counted
        evaluator = search.evaluator
        self.features = search.features(counted, torch.zeros(evaluator.trace.sites))
        """float32 [S, F]."""
        with torch.enable_grad():
            self.inputs = search.nothing_pruned(counted).inputs
        """Of the network as it came, float32 [S, INPUTS]."""
        self.relaxed: RelaxedCost = search.relaxed(counted)
        """What gates cost, as in a repair;"""
        self.few = RelaxedCost(
            evaluator.network, search.clean, self.relaxed.probes, self.relaxed.response,
            replace(search.config.gates, images_per_step=IMAGES_PER_STEP),
        )  # fmt: skip
        """on fewer images at a time."""
        self.cost = search.cost(counted, JUDGED_BY)

    def closed(self, policy: PruningPolicy, told: Tensor | None = None) -> Tensor:
        """What a policy proposes, float32 [S]; ``told`` [F] is 0 for features that it is not."""
        features = self.features if told is None else self.features * told
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
        """Of the best first mask that closed gates float32 [S] give."""
        return float(self.cost.worth(self.search.first_masks(self.counted, ranking)).max())


def lessons_of(
    networks: Sequence[ZooModel], seeds: Sequence[int], data: Path | None, samples: int, work: Path
) -> list[Lesson]:
    """Of every network that is called backdoored; its evidence is kept in ``work``, so that a call
    can be interrupted."""
    images = {name: load(name, data, "train") for name in {n.recipe.dataset for n in networks}}
    lessons = []
    for seed in seeds:
        for network in networks:
            search = search_of(network, images[network.recipe.dataset], samples, seed, work)
            found = "no backdoor found" if search is None else "ready"
            print(f"{network.name} seed {seed}: {found}", file=sys.stderr, flush=True)
            if search is not None:
                lessons.append(Lesson(network, seed, search))
    return lessons
