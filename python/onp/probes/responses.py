"""How the sites respond to a trigger: the array that ranks channels for pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from onp.ledger import Ledger
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import SiteLayer


@torch.no_grad()
def activations(network: FrozenNetwork, images: Tensor) -> list[Tensor]:
    """Every site layer's activations on images, [N, C, H, W], tokens [N, C, T] or [N, C] each."""
    seen: list[Tensor] = []

    def keep(_layer: SiteLayer, values: Tensor) -> None:
        seen.append(values)

    network(images, observe=keep)
    return seen


def responses(
    before: list[Tensor], network: FrozenNetwork, triggered: Tensor, ledger: Ledger
) -> Tensor:
    """Mean absolute change of each site's activation, over its layer's mean change: float32 [S].

    before: ``activations`` on the same images without the trigger.
    """
    after = activations(network, triggered)
    ledger.count(len(triggered))
    parts = []
    for clean, changed in zip(before, after, strict=True):
        change = (changed - clean).abs().transpose(0, 1).flatten(1).mean(1)
        parts.append(change / change.mean().clamp_min(1e-12))
    return torch.cat(parts).cpu()


def activation_statistics(before: list[Tensor]) -> Tensor:
    """Mean, deviation and share of zeros of each site's activation: float32 [S, 3]."""
    rows = []
    for values in before:
        flat = values.transpose(0, 1).flatten(1)
        rows.append(torch.stack([flat.mean(1), flat.std(1), (flat <= 0).float().mean(1)], 1))
    return torch.cat(rows).cpu()
