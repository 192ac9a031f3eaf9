"""Fitting a policy to what was met on many networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from bench.train_agent.experience import Lesson
from onp.agent.learner import Experience
from onp.agent.policy import CautionPolicy
from onp.config import AgentConfig


@dataclass(frozen=True)
class FittingConfig:
    steps: int = 600
    batch: int = 4
    """States of one network in a step."""
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    dropped: float = 0.3
    """Chance of each feature to be 0 on all sites in a step, so that the policy works with few."""


def untrained(lessons: Sequence[Lesson], agent: AgentConfig, seed: int) -> CautionPolicy:
    first = lessons[0]
    return CautionPolicy(
        first.features.shape[1], len(first.graph.relations),
        hidden=agent.hidden, rounds=agent.messages, seed=seed,
    )  # fmt: skip


def fit(
    lessons: Sequence[Lesson], agent: AgentConfig, config: FittingConfig, seed: int
) -> CautionPolicy:
    """A policy fitted to all lessons; seeded."""
    policy = untrained(lessons, agent, seed)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps
    )
    random = torch.Generator().manual_seed(seed)
    for _ in range(config.steps):
        lesson = lessons[int(torch.randint(len(lessons), (), generator=random))]
        draw = torch.randperm(len(lesson.met), generator=random)[: config.batch]
        batch = [lesson.met[i] for i in draw.tolist()]
        kept = torch.rand(lesson.features.shape[1], generator=random) >= config.dropped
        loss = _loss(policy, lesson, batch, lesson.features * kept)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy.eval()


@torch.no_grad()
def loss_on(policy: CautionPolicy, lessons: Sequence[Lesson]) -> float:
    """Mean over lessons."""
    return fmean(
        float(_loss(policy, lesson, lesson.met, lesson.features).detach()) for lesson in lessons
    )


def _loss(
    policy: CautionPolicy, lesson: Lesson, met: Sequence[Experience], features: torch.Tensor
) -> torch.Tensor:
    factors = policy(lesson.graph, features, [one.state for one in met])
    losses = [one.loss(caution) for one, caution in zip(met, factors, strict=True)]
    return torch.stack(losses).mean()
