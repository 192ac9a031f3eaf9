"""What a repair gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Result:
    """A repaired network, why, and what was done to it."""

    model: nn.Module
    """The repaired network: a copy of the suspect with pruned sites zeroed, same shapes."""
    mask: Tensor
    """bool [S]: the pruned sites."""
    verdict: str
    """``backdoor``, ``clean``, or ``suspected`` where the evidence calls nothing, but a target was
    named."""
    report: dict[str, Any]
    """JSON-able; the schema is in docs/report.md."""
    _cut: Callable[[], tuple[nn.Module, int]] = field(repr=False)

    def compact(self) -> nn.Module:
        """A smaller network with the same logits: pruned channels are cut out where no residual
        stream needs them. How many sites stayed zeroed instead is in ``report["sites"]``."""
        model, stayed = self._cut()
        self.report["sites"]["zeroed_in_compact"] = stayed
        return model
