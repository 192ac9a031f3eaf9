"""The best masks of a search."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Elite:
    """The best distinct masks seen, with the worth they had when seen."""

    capacity: int
    masks: list[Tensor] = field(default_factory=list)
    worths: list[float] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    def offer(self, masks: Tensor, worths: Tensor) -> None:
        """Take masks bool [B, S], in host memory, of worth [B] if they are new and good enough."""
        for mask, worth in zip(masks, worths.tolist(), strict=True):
            key = mask.numpy().tobytes()
            if key in self._seen:
                continue
            self._seen.add(key)
            self.masks.append(mask.clone())
            self.worths.append(worth)
        order = sorted(range(len(self.worths)), key=lambda i: -self.worths[i])[: self.capacity]
        self.masks = [self.masks[i] for i in order]
        self.worths = [self.worths[i] for i in order]

    @property
    def best(self) -> Tensor:
        return self.masks[0]
