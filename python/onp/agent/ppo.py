"""Proximal policy optimisation over masks (Schulman et al., arXiv 1707.06347), top to bottom.

PPO because a reward costs hundreds of image-forwards while a policy update costs none: its clipped
ratio lets each batch of evaluated masks be used for several gradient steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.agent.elite import Elite
from onp.agent.env import Observation, PruningEnv
from onp.agent.policy import PruningPolicy
from onp.config import AgentConfig


@dataclass(frozen=True)
class UpdateLog:
    """One line of the learning curve."""

    reward: float
    """Mean episode reward (gain in worth)."""
    best: float
    """Best worth so far."""
    entropy: float
    """Of the flip distribution, in nats per copy."""
    bits_moved: float
    """Expected flips that the update added or took away: the summed absolute change of the flip
    probabilities, per copy."""
    flips: float
    """Mean flips a step."""
    kl: float
    evaluations_per_second: float


def optimise(
    env: PruningEnv,
    policy: PruningPolicy,
    elite: Elite,
    config: AgentConfig,
    *,
    seed: int,
    report: Callable[[int, UpdateLog], None] = lambda update, log: None,
) -> list[UpdateLog]:
    """Improve the masks in ``elite`` (not empty), learning ``policy`` on the way."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    logs: list[UpdateLog] = []
    for update in range(config.updates):
        started, counted = time.perf_counter(), env.evaluations

        # Rollout: every copy starts from the best mask so far.
        state, _ = env.reset(elite.best)
        states, flips, log_probs, values, rewards = [], [], [], [], []
        truncated = False
        while not truncated:
            with torch.no_grad():
                logits, value = policy(state)
                flip = torch.rand(logits.shape, generator=random) < logits.sigmoid()
            states.append(state)
            flips.append(flip)
            log_probs.append(_log_prob(logits, flip))
            values.append(value)
            state, reward, _, truncated, _ = env.step(flip)
            rewards.append(reward)
            elite.offer(state.pruned, state.worth)

        # Generalised advantage estimation; nothing is worth having after the last step.
        advantages: list[Tensor] = []
        running = torch.zeros(env.copies)
        for t in reversed(range(len(rewards))):
            after = values[t + 1] if t + 1 < len(rewards) else torch.zeros(env.copies)
            delta = rewards[t] + config.discount * after - values[t]
            running = delta + config.discount * config.trace_decay * running
            advantages.insert(0, running)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        spread = torch.stack(advantages)
        centred = (spread - spread.mean()) / spread.std().clamp_min(1e-6)

        # Update.
        before = _flip_probabilities(policy, states[0])
        kl = 0.0
        for _ in range(config.epochs):
            loss = torch.zeros(())
            divergences = []
            for t, (seen, flip) in enumerate(zip(states, flips, strict=True)):
                logits, value = policy(seen)
                log_ratio = _log_prob(logits, flip) - log_probs[t]
                ratio = log_ratio.exp()
                clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
                gain = torch.minimum(ratio * centred[t], clipped * centred[t]).mean()
                error = (value - returns[t]).pow(2).mean()
                loss = loss - gain + config.value_weight * error
                loss = loss - config.entropy_weight * _entropy(logits).mean()
                divergences.append((ratio.detach() - 1 - log_ratio.detach()).mean())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.gradient_norm)
            optimizer.step()
            kl = float(torch.stack(divergences).mean())
        after_update = _flip_probabilities(policy, states[0])
        moved = (after_update - before).abs().sum(1)
        with torch.no_grad():
            entropy = float(_entropy(policy(states[0])[0]).mean())
        logs.append(
            UpdateLog(
                float(torch.stack(rewards).sum(0).mean()),
                elite.worths[0],
                entropy,
                float(moved.mean()),
                float(torch.stack(flips).float().sum(2).mean()),
                kl,
                (env.evaluations - counted) / max(time.perf_counter() - started, 1e-9),
            )
        )
        report(update, logs[-1])
    return logs


def _log_prob(logits: Tensor, flips: Tensor) -> Tensor:
    """Log-probability [B] of independent flips bool [B, S] under logits [B, S]."""
    signed = torch.where(flips, logits, -logits)
    return torch.nn.functional.logsigmoid(signed).sum(1)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy [B] of independent flips, in nats."""
    softplus = torch.nn.functional.softplus
    return (softplus(-logits) + (1 - logits.sigmoid()) * logits).sum(1)


@torch.no_grad()
def _flip_probabilities(policy: PruningPolicy, state: Observation) -> Tensor:
    probabilities: Tensor = policy(state)[0].sigmoid()
    return probabilities
