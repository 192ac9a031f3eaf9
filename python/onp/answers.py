"""What logits say of answers: how far one leads, and how far all have moved."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def margin(logits: Tensor, answers: Tensor) -> Tensor:
    """How far each answer int64 [...] leads in logits [..., K]: over the log-sum-exp of the others,
    float32 [...]."""
    chosen = answers[..., None]
    rest = logits.scatter(-1, chosen, -torch.inf).logsumexp(-1)
    return logits.gather(-1, chosen).squeeze(-1) - rest


def harm(logs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    """Cross-entropy and divergence from the original's answers, nats an image: of log-probabilities
    [N, K] each, labels int64 [N]."""
    moved = F.kl_div(logs, original, log_target=True, reduction="batchmean")
    return F.nll_loss(logs, labels) + moved
