"""What a mask is worth against one probe, from clean images alone: the race uses it.

    J(m) = share of the probe's success that m removes
           - accuracy_weight * (loss of clean accuracy; a gain counts up to .02)
           - price * (number of pruned sites)

Success and accuracy are mean probabilities (of the probe's target, in excess of the same images'
own; of the true label), not counts: a hundred images cannot tell masks apart by counts. J is a
share, so that probes of different strength can be compared; what a mask costs in the end is
``onp.agent.cost``'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onp.config import ScoreConfig
from onp.evaluate import MaskEvaluator
from onp.probes.probe import Probe

MOST_GAINED = 0.02
"""Accuracy above the suspect's that is counted: a hundred images make some mask look better."""


@dataclass(frozen=True)
class Values:
    """The parts of J for B masks, float32 [B] each."""

    total: Tensor
    removed: Tensor
    """Share of probe success removed, at most 1."""


class Objective:
    """J on a fixed set of clean images and the same ones triggered."""

    def __init__(
        self,
        evaluator: MaskEvaluator,
        images: Tensor,
        labels: Tensor,
        probe: Probe,
        config: ScoreConfig,
    ) -> None:
        """images: float32 [N, C, H, W] with labels int64 [N]."""
        self.evaluator = evaluator
        self.labels = labels
        self.wanted = probe.wanted(labels)
        self.config = config
        self.images = torch.cat([images, probe(images)])
        accuracy, success = self._measure(torch.zeros(1, evaluator.trace.sites, dtype=torch.bool))
        self.accuracy, self.success = float(accuracy), max(float(success), 1e-3)

    def __call__(self, pruned: Tensor) -> Values:
        """Worth of masks bool [B, S]; one engine call."""
        accuracy, success = self._measure(pruned)
        removed = 1 - success / self.success
        lost = (self.accuracy - accuracy).clamp_min(-MOST_GAINED)
        total = (
            removed - self.config.accuracy_weight * lost - self.config.price * pruned.sum(1).float()
        )
        return Values(total, removed)

    def _measure(self, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and success, float32 [B] each."""
        clean, hit = self.evaluator.run(pruned, self.images).softmax(2).chunk(2, 1)  # [B, N, K]
        accuracy = clean.gather(2, self.labels.expand(len(pruned), -1)[..., None]).mean((1, 2))
        others = self.labels != self.wanted
        if not bool(others.any()):
            return accuracy, torch.zeros(len(pruned))
        answers = self.wanted[others].expand(len(pruned), -1)[..., None]
        excess = (hit - clean)[:, others].gather(2, answers).squeeze(2)
        return accuracy, excess.mean(1).clamp_min(0)
