"""What the agent is compared with: searches with the same cost, rivals from the same first masks.

Variants of the agent change its configuration, or leave a probe family out. The others take the
agent's place on every draw of the images and stop when they have spent the image-forwards that it
took there, on the same network with the same seed; what they prune is given back as its is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onp.agent.cost import Cost
from onp.agent.elite import Elite
from onp.agent.flips import Round
from onp.agent.learner import Learner
from onp.config import Config
from onp.search import FINALISTS, Search

LEARNING = 5
"""Steps of Adam after each round."""


def _agent(**changed: float | tuple[int, ...]) -> Callable[[Config], Config]:
    return lambda config: replace(config, agent=replace(config.agent, **changed))


VARIANTS: dict[str, Callable[[Config], Config]] = {
    "onp": lambda config: config,
    "learning": _agent(steps=LEARNING),
    "learning-no-gnn": _agent(steps=LEARNING, messages=0),
    "learning-layerwise": lambda config: replace(
        _agent(steps=LEARNING)(config), graph=replace(config.graph, layerwise=True)
    ),
    "singles": _agent(first=1, most=1, little=0.0),
    "one-step": _agent(rounds=1, further=()),
    "two-draws": _agent(images=128),
}
"""The agent's own: the model of the margins corrected by what the GNN learns on the way, by what it
learns without messages, on one graph per layer as in the paper; single flips; one set instead of a
sequence; two draws of 128 images and giving back on others, instead of all."""
POLICIES = {"policy": 1, "policy-no-gnn": 0}
"""Gates that start from a policy's proposal; its rounds of messages."""
BATCH = 32
"""Masks in one call of the engine."""
ELITE = 0.25
SMOOTHING = 0.3
"""Of the cross-entropy method: share of a batch that is learned from, and how much of it."""
EXPECTED_FLIPS = 3.0

Rival = Callable[[Elite, Cost, int, torch.Generator], None]
"""Improve the masks in an elite within so many masks."""


def cross_entropy(elite: Elite, cost: Cost, masks: int, random: torch.Generator) -> None:
    """The cross-entropy method (Rubinstein, 1999): independent sites, started at the best mask with
    ``EXPECTED_FLIPS`` flips a sample."""
    odds = EXPECTED_FLIPS / cost.sites
    chance = torch.where(elite.best, 1 - odds, odds)
    for size in _batches(masks):
        drawn = torch.rand(size, cost.sites, generator=random) < chance
        worths = cost.worth(drawn)
        elite.offer(drawn, worths)
        best = drawn[worths.topk(max(1, round(ELITE * size))).indices].float().mean(0)
        chance = (1 - SMOOTHING) * chance + SMOOTHING * best


def random_flips(elite: Elite, cost: Cost, masks: int, random: torch.Generator) -> None:
    """Up to four sites of the best mask so far, flipped at random."""
    for size in _batches(masks):
        drawn = elite.best.repeat(size, 1)
        for row in drawn:
            count = int(torch.randint(1, 5, (), generator=random))
            row[torch.randint(cost.sites, (count,), generator=random)] ^= True
        elite.offer(drawn, cost.worth(drawn))


def nothing(elite: Elite, cost: Cost, masks: int, random: torch.Generator) -> None:
    """The best of the first masks: what the gates and the race found."""


RIVALS: dict[str, Rival] = {
    "cem": cross_entropy,
    "random": random_flips,
    "gates-alone": nothing,
}


class Measured(Search):
    """The agent's search, with what its moves cost."""

    def __init__(self, search: Search) -> None:
        super().__init__(search.scene, search.graph, search.norm_shift, search.evidence)
        self.spent: list[int] = []
        """Image-forwards of the moves on each draw of the images."""

    def improved(
        self, cost: Cost, start: Tensor, learner: Learner | None, limit: int
    ) -> tuple[Elite, list[Round]]:
        before = self.evaluator.ledger.total
        elite, rounds = super().improved(cost, start, learner, limit)
        self.spent.append(self.evaluator.ledger.total - before)
        return elite, rounds


class RivalSearch(Search):
    """The same search with a rival's moves."""

    def __init__(self, search: Search, rival: Rival, limits: Sequence[int], seed: int) -> None:
        """limits: image-forwards on each draw of the images."""
        super().__init__(search.scene, search.graph, search.norm_shift, search.evidence)
        self.rival, self.limits = rival, list(limits)
        self.random = torch.Generator().manual_seed(seed)

    def improved(
        self, cost: Cost, start: Tensor, learner: Learner | None, limit: int
    ) -> tuple[Elite, list[Round]]:
        before = self.evaluator.ledger.total
        elite = Elite(max(FINALISTS, self.config.choice.leaders))
        elite.offer(start, cost.worth(start))
        left = self.limits.pop(0) - (self.evaluator.ledger.total - before)
        self.rival(elite, cost, max(0, left // len(cost.both)), self.random)
        return elite, []


def _batches(masks: int) -> list[int]:
    sizes = [BATCH] * (masks // BATCH)
    return [*sizes, masks % BATCH] if masks % BATCH else sizes


def has(search: Search, family: str) -> bool:
    """Whether some, but not all, of the counted probes are of this family."""
    own = [contender.probe.family.name == family for contender in search.evidence.counted]
    return any(own) and not all(own)


def without(search: Search, family: str) -> Search:
    """With no probe of this family; the verdict, which it had a part in, stands."""
    evidence = replace(
        search.evidence,
        contenders=[c for c in search.evidence.contenders if c.probe.family.name != family],
        counted=[c for c in search.evidence.counted if c.probe.family.name != family],
    )
    return Search(search.scene, search.graph, search.norm_shift, evidence)
