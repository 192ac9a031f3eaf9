"""Squares that lead the images of one class away, to whatever other one.

A trigger that works on one class alone (TaCT, Tang et al., USENIX Security 2021, arXiv 1908.00686)
shows nothing to squares that are to lead all images to a class. To ask for every pair of classes is
dear. But an attacker's class is nearer than any other once images leave theirs: so a square is
learned to lead a class's images away, and what they then answer is looked at. Where the images of
most classes come to the same one, the trigger works on all (bench/NOTES.md, "Other kinds of
attack").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.answers import margin
from onp.clean import Clean
from onp.ledger import Ledger
from onp.optimizers import Adam
from onp.probes.families import Family, Range
from onp.probes.gradients import passes, pixel_gradients
from onp.suspect.network import FrozenNetwork

LEAST = 8
"""Images of a class, answered rightly, that it takes: half of them to learn on."""
JUDGED = 6
"""Of the other half, at most."""
GONE = -5.0
"""Margin of its own label, in logits, from which on an image has left."""


@dataclass(frozen=True)
class Departures:
    """What squares of some places make of images of one class."""

    sources: list[int]
    """Classes that have images enough."""
    places: Sequence[int]
    """Numbers of the places."""
    gained: Tensor
    """Mean probability that every class gains on a source's images by the source's own square,
    float32 [places, sources, K]; 0 for the source itself."""


def away(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of images that are to leave their labels int64 [N], logits [N, K]: how far these
    lead, summed."""
    return margin(logits, labels).clamp_min(GONE).sum()


def images_of(clean: Clean, classes: int) -> dict[int, Tensor]:
    """By class, where there are enough of them: numbers int64 [n] of the clean images that are
    answered rightly."""
    right = clean.answers == clean.labels
    return {
        label: places
        for label in range(classes)
        if len(places := ((clean.labels == label) & right).nonzero().squeeze(1)) >= LEAST
    }


def departures(
    network: FrozenNetwork,
    clean: Clean,
    families: Mapping[int, Family],
    *,
    steps: int,
    most: int,
    valid: Range,
    seed: int,
    ledger: Ledger,
) -> Departures:
    """Learn a square of each family, by the number of its place, for every class (``most``, the
    first), on one of its images in each step, and judge it on others. Costs ``2 * steps + JUDGED``
    image-forwards a square at most.
    """
    random = torch.Generator().manual_seed(seed)
    images, labels = clean.images, clean.labels
    channels, height, width = images.shape[1:]
    known = images_of(clean, network.trace.num_classes)
    sources = list(known)[:most]
    learned = [known[source][: len(known[source]) // 2] for source in sources]
    judged = [known[source][len(known[source]) // 2 :][:JUDGED] for source in sources]
    gains = list[Tensor]()
    for family in families.values() if sources else ():
        state = family.start(len(sources), (channels, height, width), random)
        state = [parameter.to(network.device).requires_grad_(True) for parameter in state]
        optimizer = Adam((state, family.learning_rate), betas=(0.5, 0.9))
        for step in range(steps):
            rows = torch.stack(
                [one[torch.randint(len(one), (), generator=random)] for one in learned]
            )
            shown = images[rows, None].to(network.device)
            triggered = family.apply(state, shown, valid).flatten(0, 1)
            _, gradients = pixel_gradients(
                network, triggered, labels[rows].to(network.device), away
            )
            optimizer.zero_grad()
            (triggered * gradients).sum().backward()
            optimizer.step()
            ledger.count(2 * len(sources))
            ledger.tick(step + 1, steps)
        gained = _gained(network, clean, judged, family, state, valid)
        ledger.count(sum(map(len, judged)))
        gains.append(gained.scatter(1, torch.tensor(sources)[:, None], 0.0))
    none = torch.zeros(len(families), 0, network.trace.num_classes)
    return Departures(sources, list(families), torch.stack(gains) if gains else none)


@torch.no_grad()
def _gained(
    network: FrozenNetwork,
    clean: Clean,
    judged: Sequence[Tensor],
    family: Family,
    state: list[Tensor],
    valid: Range,
) -> Tensor:
    """Mean probability that each class gains by every square on its images, whose numbers int64
    [n] are given: float32 [squares, K]."""
    most = max(map(len, judged))
    rows = torch.stack([F.pad(one, (0, most - len(one)), value=int(one[0])) for one in judged])
    triggered = family.apply(state, clean.images[rows].to(network.device), valid).flatten(0, 1)
    after = torch.cat([network(part).softmax(1) for (part,) in passes(triggered)]).cpu()
    gained = (after.view(*rows.shape, -1) - clean.original[rows].exp().cpu()).nan_to_num(0.0)
    asked = torch.arange(most) < torch.tensor([len(one) for one in judged])[:, None]
    return (gained * asked[..., None]).sum(1) / asked.sum(1, keepdim=True)
