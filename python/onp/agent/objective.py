"""What a mask is worth, from clean images and probes alone.

    J(m) = mean over the counted probes of the share of their success that m removes
           - accuracy_weight * (loss of clean accuracy)
           - price * (number of pruned sites)

Success and accuracy are mean probabilities (of the probe's target, of the true label), not counts:
150 held-back images cannot tell masks apart by counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.config import ScoreConfig
from onp.evaluate import MaskEvaluator
from onp.probes.probe import Probe


@dataclass(frozen=True)
class Values:
    """The parts of J for B masks, float32 [B] each."""

    total: Tensor
    removed: Tensor
    """Share of probe success removed, at most 1."""
    accuracy: Tensor
    """Mean probability of the true label on clean images."""
    success: Tensor
    """Mean probability of the targets on triggered images, in excess of the same images' own."""


class Objective:
    """J on a fixed set of clean images and, dealt out among the probes, the same ones triggered."""

    def __init__(
        self,
        evaluator: MaskEvaluator,
        images: Tensor,
        labels: Tensor,
        probes: Sequence[Probe],
        config: ScoreConfig,
    ) -> None:
        self.evaluator = evaluator
        self.labels = labels
        self.config = config
        self.sites = evaluator.trace.sites
        self.hands = dealt_out(len(images), len(probes))
        """Which of the images each probe triggers."""
        self.wanted = [p.wanted(labels[h]) for p, h in zip(probes, self.hands, strict=True)]
        triggered = [probe(images[h]) for probe, h in zip(probes, self.hands, strict=True)]
        self.images = torch.cat([images, *triggered])
        none = torch.zeros(1, self.sites, dtype=torch.bool)
        accuracy, success = self._measure(none)
        self.accuracy, self.success = float(accuracy), success[0].clamp_min(1e-3)

    def __call__(self, pruned: Tensor) -> Values:
        """Worth of masks bool [B, S]; one engine call."""
        accuracy, success = self._measure(pruned)
        removed = (1 - success / self.success).mean(1)
        lost = (self.accuracy - accuracy).clamp_min(-0.02)
        total = (
            removed - self.config.accuracy_weight * lost - self.config.price * pruned.sum(1).float()
        )
        return Values(total, removed, accuracy, success.mean(1))

    def _measure(self, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy [B] and success per probe [B, P]."""
        probabilities = self.evaluator.run(pruned, self.images).softmax(2)
        sizes = [len(self.labels), *(len(self.labels[hand]) for hand in self.hands)]
        clean, *triggered = probabilities.split(sizes, 1)  # [B, n, K] each
        accuracy = clean.gather(2, self.labels.expand(len(pruned), -1)[..., None]).mean((1, 2))
        success = []
        for wanted, hand, hit in zip(self.wanted, self.hands, triggered, strict=True):
            others = self.labels[hand] != wanted
            if not bool(others.any()):
                success.append(torch.zeros(len(pruned)))
                continue
            answers = wanted[others].expand(len(pruned), -1)[..., None]
            excess = (hit - clean[:, hand])[:, others].gather(2, answers).squeeze(2)
            success.append(excess.mean(1).clamp_min(0))
        return accuracy, torch.stack(success, 1)


def dealt_out(count: int, hands: int) -> list[Tensor]:
    """The numbers 0 .. count - 1, shuffled (always alike: images come with their classes in turn),
    dealt out in ``hands`` parts, int64 each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [order[hand::hands].sort().values for hand in range(hands)]
