"""Fitting a policy to many networks, by the gradient of what the gates it proposes cost there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.train_agent.lessons import Lesson
from onp.agent.policy import PruningPolicy


@dataclass(frozen=True)
class FittingConfig:
    steps: int = 1000
    """Of one network each."""
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    gradient_norm: float = 1.0
    untold: float = 0.3
    """Chance of each feature to be 0 on all sites in a step, so that the policy works with few."""


def fit(
    lessons: Sequence[Lesson], *, rounds: int, config: FittingConfig, seed: int
) -> PruningPolicy:
    """A policy with ``rounds`` of message passing, fitted to all lessons; seeded."""
    first = lessons[0]
    columns, relations = first.features.shape[1], len(first.search.graph.relations)
    policy = PruningPolicy(columns, relations, rounds=rounds, seed=seed)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps
    )
    random = torch.Generator().manual_seed(seed)
    for _ in range(config.steps):
        lesson = lessons[int(torch.randint(len(lessons), (), generator=random))]
        known = torch.rand(columns, generator=random) >= config.untold
        loss = lesson.teacher(1 - lesson.closed(policy, known), random)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.gradient_norm)
        optimizer.step()
        schedule.step()
    return policy.eval()
