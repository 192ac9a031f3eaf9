"""Race masks that prune the head of each ranking: few images first, the best on more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onp.config import RaceConfig, ScoreConfig
from onp.evaluate import MaskEvaluator
from onp.masks import heads_of
from onp.probes.objective import Objective
from onp.probes.probe import Probe


@dataclass(frozen=True, eq=False)
class Contender:
    """A probe, the ranking it gives, and the best mask found on that ranking."""

    probe: Probe
    ranking: Tensor
    """float32 [S]: responses to the probe; larger = prune sooner."""
    success: float
    """Mean excess probability of the target under the probe, nothing pruned."""
    mask: Tensor
    """bool [S]; empty for a probe that was not raced."""
    score: float = 0.0
    """J of the mask, judged by this probe alone; 0 for a probe that was not raced."""
    removed: float = 0.0

    @property
    def size(self) -> int:
        return int(self.mask.sum())


def ranking_masks(ranking: Tensor, shares: Sequence[float]) -> Tensor:
    """Masks bool [len(shares), S] that prune the first share * S sites of a ranking."""
    return heads_of(ranking, [max(1, round(share * len(ranking))) for share in shares])


def race(
    evaluator: MaskEvaluator,
    images: Tensor,
    labels: Tensor,
    probes: Sequence[Probe],
    rankings: Sequence[Tensor],
    config: RaceConfig,
    score: ScoreConfig,
) -> list[Contender]:
    """Each probe's best mask, judged by that probe; best contender first.

    Every candidate is scored on ``first_images``; of all candidates the best ``survivors`` share,
    and the best of each probe, are scored again on ``second_images`` others.
    """
    if not probes:
        return []
    first, second = slice(0, config.first_images), slice(-config.second_images, None)
    nothing = torch.zeros_like(rankings[0], dtype=torch.bool)
    objectives = [
        Objective(evaluator, images[first], labels[first], probe, score) for probe in probes
    ]
    unraced = [
        Contender(probe, ranking, objective.success, nothing)
        for probe, ranking, objective in zip(probes, rankings, objectives, strict=True)
    ]
    heats: list[tuple[Objective, Tensor, Tensor]] = []
    for ranking, objective in zip(rankings, objectives, strict=True):
        weak = objective.success < config.least_success
        masks = ranking_masks(ranking, () if weak else config.sizes)
        heats.append((objective, masks, objective(masks).total))
    everything = torch.cat([total for _, _, total in heats]).sort(descending=True).values
    bar = everything[max(1, round(config.survivors * len(everything))) - 1 :][:1]
    contenders = []
    for contender, (objective, masks, total) in zip(unraced, heats, strict=True):
        if len(masks) == 0:
            contenders.append(contender)
            continue
        masks = masks[(total >= bar) | (total == total.max())]
        objective = Objective(evaluator, images[second], labels[second], contender.probe, score)
        values = objective(masks)
        best = int(values.total.argmax())
        contenders.append(
            replace(
                contender,
                success=objective.success,
                mask=masks[best],
                score=float(values.total[best]),
                removed=float(values.removed[best]),
            )
        )
    return sorted(contenders, key=lambda c: (c.size == 0, -c.score))
