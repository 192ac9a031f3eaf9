"""How far the margin of each class can be driven, with nothing asked of the image.

A trigger teaches a network that something overrides all else in an image, and no image that it is
trained on ever contradicts that; so, somewhere among all images, a backdoored network is surer of
the attacker's class than of any other, whatever kind of trigger that is (MM-BD: Wang, Xiang, Miller
and Kesidis, IEEE S&P 2024, arXiv 2205.06900). They compare the largest margins of the classes with
one another. Classes differ by nature, too, the more the fewer there are; so here they are also
compared as multiples of how sure the network is of each class's clean images (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onp.clean import Clean
from onp.ledger import Ledger
from onp.probes.families import Range
from onp.probes.gradients import passes, pixel_gradients
from onp.suspect.network import FrozenNetwork

STEP = 0.02
"""Root mean square of a step's change without momentum, over the width of the valid range; from the
first to the last it falls by the number of steps."""
MOMENTUM = 0.8
PRIOR = 2
"""Images that a class's natural margin is drawn towards all others' by: some have one or two."""
MOST = 1e30
"""Margins beyond this, and such as are no numbers, count as this."""
TOGETHER = 16
"""Classes whose images are driven in one call."""


@dataclass(frozen=True)
class Margins:
    """How sure of each class the network can be made, and is of its clean images."""

    classes: Sequence[int]
    driven: Tensor
    """Largest margin that any image was driven to, in logits, float32 [K]."""
    natural: Tensor
    """Mean margin of the class's clean images, wrong answers counting 0 and the mean of all images
    as ``PRIOR`` more, float32 [K]; infinite for a class without any, of which nothing is said."""


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label int64 [N] less the largest of the other classes, [N]; of logits [N, K] or
    log-probabilities, which tell the same."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).max(1).values


def largest_margins(
    network: FrozenNetwork,
    clean: Clean,
    classes: Sequence[int],
    *,
    steps: int,
    starts: int,
    valid: Range,
    seed: int,
    ledger: Ledger,
) -> Margins:
    """Drive ``starts`` images of noise for each class by gradient ascent on its margin, inside the
    valid range; the clean images tell what is natural.

    Costs (2 * steps + 1) * starts image-forwards a class.
    """
    random = torch.Generator().manual_seed(seed)
    low, high = valid
    found = []
    for first in range(0, len(classes), TOGETHER):
        wanted = torch.tensor(classes[first : first + TOGETHER]).repeat_interleave(starts)
        noise = torch.rand((len(wanted), *clean.images.shape[1:]), generator=random)
        start = (low + (high - low) * noise).to(network.device)
        reached = _driven(network, start, wanted.to(network.device), steps, valid, ledger)
        found.append(reached.view(-1, starts).max(1).values.cpu())
    sure = margins_of(clean.original, clean.labels).clamp_min(0.0)
    natural = []
    for one in classes:
        own = sure[clean.labels == one]
        mean = (own.sum() + PRIOR * sure.mean()) / (len(own) + PRIOR)
        natural.append(float(mean) if len(own) else torch.inf)
    return Margins(list(classes), torch.cat(found), torch.tensor(natural))


def _sureness(logits: Tensor, wanted: Tensor) -> Tensor:
    """Margins of the classes int64 [N], logits [N, K]: summed."""
    return margins_of(logits, wanted).sum()


def _driven(
    network: FrozenNetwork, images: Tensor, wanted: Tensor, steps: int, valid: Range, ledger: Ledger
) -> Tensor:
    """The largest margin on the way of images [N, C, H, W] driven to the classes int64 [N], [N]."""
    velocity = torch.zeros_like(images)
    length = STEP * (valid[1] - valid[0]) * images[0].numel() ** 0.5
    best = torch.full((len(images),), -torch.inf, device=images.device)
    for step in range(steps):
        logits, gradient = pixel_gradients(network, images, wanted, _sureness)
        best = torch.maximum(best, margins_of(logits, wanted))
        norms = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        velocity = MOMENTUM * velocity + gradient / norms
        images = (images + length * (1 - step / steps) * velocity).clamp(*valid)
        ledger.count(2 * len(images))
        ledger.tick(step + 1, steps)
    with torch.no_grad():
        last = [margins_of(network(part, None), want) for part, want in passes(images, wanted)]
    ledger.count(len(images))
    return torch.maximum(best, torch.cat(last)).nan_to_num(-torch.inf).clamp(-MOST, MOST)
