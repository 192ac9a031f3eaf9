"""The clean images, and what the network says of them before anything is pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onp.evaluate import MaskEvaluator


@dataclass(frozen=True, eq=False)
class Clean:
    images: Tensor
    """float32 [N, C, H, W]."""
    labels: Tensor
    """int64 [N]."""
    original: Tensor
    """float32 [N, K]: log-probabilities of the network as it came."""

    @classmethod
    def seen_by(cls, evaluator: MaskEvaluator, images: Tensor, labels: Tensor) -> Clean:
        """Ask the network, once for a whole repair. Costs an image-forward an image."""
        nothing = torch.zeros(1, evaluator.trace.sites, dtype=torch.bool)
        return cls(images, labels, evaluator.run(nothing, images, exact=True)[0].log_softmax(1))

    @property
    def answers(self) -> Tensor:
        """int64 [N]."""
        return self.original.argmax(1)

    def to(self, device: torch.device) -> Clean:
        """On a device."""
        return Clean(self.images.to(device), self.labels.to(device), self.original.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Clean:
        return Clean(self.images[index], self.labels[index], self.original[index])
