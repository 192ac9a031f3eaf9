"""What flips of a mask would do, told by one backward pass: a model of the cost around the mask.

The slope of the worth misleads where it matters: on an image that is answered rightly and surely
the cross-entropy is flat, so that pruning a channel which all classes need looks harmless. What is
nearly linear in a channel is the *margin*, an answer's logit over the log-sum-exp of the others. So
its gradient is taken image by image; the margins after any flips follow, and of them the costs
themselves, with the divergence as that of two answers (the label, any other).

Networks bend, though: changes are taken at ``CAUTION`` times what is linear, or, where an agent
learns, at what it says of each site (``onp.agent.caution``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.agent.cost import Cost
from onp.answers import margin

CHUNK = 64
"""Images, each with its triggered twin, in one backward pass."""
CAUTION = (1.5, 1.0)
"""Multiples of the linear change of the margins, on clean and on triggered images, at which flips
are judged by default: networks bend, and on clean images more often towards harm."""


@dataclass(frozen=True)
class Effects:
    """Of flips of one mask, on N images each clean and triggered and S sites; on the network's
    device."""

    clean: Tensor
    """float32 [N]: margins of the labels."""
    clean_change: Tensor
    """float32 [N, S]: their change by each flip."""
    triggered: Tensor
    """float32 [N]: margins of what the trigger wants,"""
    triggered_change: Tensor
    """float32 [N, S]: and their change."""
    sure: Tensor
    """float32 [N]: probability of the label, nothing pruned."""
    weight: Tensor
    """float32 [N]: of a nat on the triggered image; 0 where the trigger wants the label."""
    price: Tensor
    """float32 [S]: change of the worth by the price of a pruned site."""

    def scaled(self, caution: Tensor | None = None) -> Effects:
        """With the changes multiplied, float32 [S, 2]: on clean and on triggered images."""
        clean, triggered = CAUTION if caution is None else caution.unbind(1)
        return replace(
            self,
            clean_change=self.clean_change * clean,
            triggered_change=self.triggered_change * triggered,
        )

    def gains(self, clean_change: Tensor, triggered_change: Tensor) -> tuple[Tensor, Tensor]:
        """Gains of worth on clean and on triggered images, float32 [n] each, of changes of the
        margins float32 [N, n]."""
        clean, hit = self.clean[:, None], self.triggered[:, None]
        harm = self._harm(clean) - self._harm(clean + clean_change)
        # Uncapped, unlike the cost: an image that is turned for sure still says which way is out.
        turned = self.weight[:, None] * (F.softplus(hit) - F.softplus(hit + triggered_change))
        return harm.mean(0), turned.mean(0)

    def alone(self) -> Tensor:
        """Gain of worth by each flip alone, float32 [S]."""
        clean, triggered = self.gains(self.clean_change, self.triggered_change)
        return clean + triggered + self.price

    def together(self, moves: Tensor, caution: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gains on clean and on triggered images by flipping the sites of each move (``columns``,
        float32 [S, B]) together, the changes multiplied by ``caution`` float32 [S, 2]: float32 [B]
        each; keeps gradients."""
        if caution is None:
            caution = moves.new_ones(len(moves), 2)
        clean, triggered = caution.unbind(1)
        return self.gains(
            self.clean_change @ (clean[:, None] * moves),
            self.triggered_change @ (triggered[:, None] * moves),
        )

    def grown(self, pool: Tensor, size: int) -> list[int]:
        """Sites of ``pool`` int64 [n] in the order in which they are best flipped together: each
        adds most to the gain of those before it; at most ``size``, all that add anything."""
        changes = self.clean_change[:, pool], self.triggered_change[:, pool]
        prices = self.price[pool]
        sums, price = [change.new_zeros(len(change), 1) for change in changes], prices.new_zeros(1)
        taken = torch.zeros(len(pool), dtype=torch.bool, device=prices.device)
        picks, reached = [pool.new_empty(0)], [prices.new_zeros(1)]
        for _ in range(min(size, len(pool))):
            clean, hit = self.gains(
                *(one + change for one, change in zip(sums, changes, strict=True))
            )
            gains = (clean + hit + price + prices).masked_fill(taken, -torch.inf)
            gain, pick = gains.max(0, keepdim=True)
            # A GPU is seldom waited for: it goes on, and what adds nothing is dropped at the end.
            asked = gain.device.type == "cpu" or len(picks) % 16 == 0
            if asked and float(gain) <= float(reached[-1]):
                break
            picks.append(pick)
            reached.append(gain)
            taken[pick] = True
            sums = [one + change[:, pick] for one, change in zip(sums, changes, strict=True)]
            price = price + prices[pick]
        order, worths = torch.cat(picks), torch.cat(reached).cpu()
        better = int((worths.diff() > 0).long().cumprod(0).sum())
        chosen: list[int] = pool[order[:better]].tolist()
        return chosen

    def _harm(self, margins: Tensor) -> Tensor:
        """Cross-entropy and divergence from the original, up to a constant, float32 [N, n]."""
        lost, kept = F.softplus(-margins), F.softplus(margins)
        sure = self.sure[:, None]
        return lost + sure * lost + (1 - sure) * kept


def columns(moves: Sequence[Tensor], sites: int) -> Tensor:
    """Moves as columns, float32 [S, B]: 1 at the sites int64 [n] that each flips."""
    flips = torch.zeros(sites, len(moves))
    for number, move in enumerate(moves):
        flips[move, number] = 1
    return flips


def flip_effects(cost: Cost, mask: Tensor) -> Effects:
    """The effects on ``cost`` of flips of a mask bool [S], as far as they are linear.

    Costs 2 image-forwards an image, clean and triggered. Where the cost trusts gradients it then
    knows the mask itself as well.
    """
    network = cost.evaluator.network
    mask = mask.to(network.device)
    towards = torch.where(mask, 1.0, -1.0)  # a flip opens a closed gate, closes an open one
    parts: list[list[Tensor]] = []
    seen: list[Tensor] = []
    for first in range(0, len(cost.images), CHUNK):
        index = slice(first, first + CHUNK)
        both = torch.cat([cost.images[index], cost.triggered[index]])
        answers = torch.cat([cost.labels[index], cost.wanted[index]])
        gates = (~mask).float().expand(len(both), -1).requires_grad_(True)
        logits = network(both, gates)
        margins = margin(logits, answers)
        (slopes,) = torch.autograd.grad(margins.sum(), gates)
        clean, triggered = margins.detach().chunk(2)
        clean_change, triggered_change = (slopes * towards).chunk(2)
        parts.append([clean, clean_change, triggered, triggered_change])
        seen.append(logits.detach())
        cost.evaluator.ledger.count(2 * len(both))
    halves = [logits.chunk(2) for logits in seen]
    cost.saw(mask, torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves]))
    clean, clean_change, triggered, triggered_change = map(torch.cat, zip(*parts, strict=True))
    return Effects(
        clean, clean_change, triggered, triggered_change,
        cost.original.exp().gather(1, cost.labels[:, None]).squeeze(1),
        cost.weight,
        cost.config.price * towards,
    )  # fmt: skip
