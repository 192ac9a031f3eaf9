"""The final mask, chosen by clean data: restore what need not be pruned, then pick a finalist.

Finalists are compared on all clean images by mean cross-entropy and by divergence from the
original's logits, which tell masks apart where counting errors on a few hundred images cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.agent.objective import Objective, dealt_out
from onp.config import ChoiceConfig
from onp.evaluate import MaskEvaluator
from onp.probes.probe import Probe


def restore(mask: Tensor, objective: Objective, rounds: int) -> Tensor:
    """Give back pruned sites whose return does not lower the mask's worth; mask bool [S].

    Each round tries every site alone, then the best half of the harmless ones together, and keeps
    the larger step that does not lower the worth.
    """
    best = float(objective(mask[None]).total)
    for _ in range(rounds):
        sites = mask.nonzero().squeeze(1)
        if len(sites) == 0:
            break
        trials = mask.expand(len(sites), -1).clone()
        trials[torch.arange(len(sites)), sites] = False
        worths = objective(trials).total
        order = worths.argsort(descending=True, stable=True)
        harmless = order[worths[order] >= best]
        if len(harmless) == 0:
            break
        together = mask.clone()
        together[sites[harmless[: (len(harmless) + 1) // 2]]] = False
        single = trials[harmless[0]]
        options = torch.stack([together, single])
        worth = objective(options).total
        pick = 0 if float(worth[0]) >= best else 1
        mask, best = options[pick], max(best, float(worth[pick]))
    return mask


@dataclass(frozen=True, eq=False)
class Choice:
    mask: Tensor
    """bool [S]."""
    cost: float
    """Cross-entropy added + divergence + weighted probe success left, in nats an image."""
    crossfit: float
    """The same for a mask chosen on one half of the images and measured on the other."""
    interval: tuple[float, float]
    """95% interval of the cross-fitted cost."""
    success_before: list[float]
    """Mean excess probability of each counted probe's target, nothing pruned."""
    success_after: list[float]
    """The same under the chosen mask."""


def choose(
    finalists: Sequence[Tensor],
    evaluator: MaskEvaluator,
    images: Tensor,
    labels: Tensor,
    probes: Sequence[Probe],
    config: ChoiceConfig,
) -> Choice:
    """The cheapest of the finalists (masks bool [S]) and of pruning nothing, on all clean images.

    cost = cross-entropy over the original's + KL(original || masked)
           + success_weight * mean excess probability of the probes' targets
    """
    masks = torch.stack([torch.zeros_like(finalists[0]), *finalists])
    logs = evaluator.run(masks, images).log_softmax(2)
    entropy = -logs.gather(2, labels.expand(len(masks), -1)[..., None]).squeeze(2)  # [M, N]
    divergence = (logs[:1].exp() * (logs[:1] - logs)).sum(2)
    costs = (entropy - entropy[:1]) + divergence
    successes = []
    for probe, hand in zip(probes, dealt_out(len(images), len(probes)), strict=True):
        wanted = probe.wanted(labels[hand])
        triggered = evaluator.run(masks, probe(images[hand])).softmax(2)
        excess = (triggered - logs[:, hand].exp()).gather(
            2, wanted.expand(len(masks), -1)[..., None]
        )
        excess = excess.squeeze(2).clamp_min(0) * (labels[hand] != wanted)
        successes.append(excess.sum(1) / max(len(hand), 1))
        costs[:, hand] += config.success_weight * excess
    best = int(costs.mean(1).argmin())
    halves = torch.zeros(len(labels), dtype=torch.bool)
    for hand in dealt_out(len(images), len(probes)):  # either half sees every probe
        halves[hand[::2]] = True
    fitted = torch.empty(len(labels))
    for half in (halves, ~halves):
        fitted[~half] = costs[int(costs[:, half].mean(1).argmin())][~half]
    mean, error = float(fitted.mean()), float(fitted.std() / len(fitted) ** 0.5)
    interval = (mean - 1.96 * error, mean + 1.96 * error)
    return Choice(
        masks[best],
        float(costs[best].mean()),
        mean,
        interval,
        [float(success[0]) for success in successes],
        [float(success[best]) for success in successes],
    )
