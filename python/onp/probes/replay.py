"""Replay what the batch norms remember: a trigger of any kind that explains their shift.

Other families say what a trigger looks like and look for one that reaches a class. This one says
what a trigger does inside (``norm_shift``) and lets it look like anything: one map added to every
image plus what a small convolutional network adds to each. First it only learns to move the norms'
means as training did, and no class is asked for: a backdoored network then answers the attacker's.
After that, reaching that class counts too.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.config import ReplayConfig
from onp.ledger import Ledger
from onp.probes.families import Range
from onp.probes.norm_shift import BATCH, NormShift
from onp.probes.synthesis import Probe
from onp.suspect.network import FrozenNetwork


class Replay:
    """images + map + network(images)."""

    hidden = 16
    """Channels between the network's convolutions."""
    learning_rate = 0.02
    """Of the map, as a share of the valid range; the network's is a quarter."""

    def __init__(self, name: str = "replay") -> None:
        self.name = name

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        """The map, then weight and bias of three 3x3 convolutions; the last starts at 0."""
        sizes = [shape[0], self.hidden, self.hidden, shape[0]]
        parameters = [torch.zeros(probes, 1, *shape)]
        for place, (read, made) in enumerate(itertools.pairwise(sizes)):
            bound = 0.0 if place == 2 else (9 * read) ** -0.5
            weight = torch.rand(probes, made, read, 3, 3, generator=generator) * 2 - 1
            parameters += [weight * bound, torch.zeros(probes, made)]
        return parameters

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        low, high = valid
        maps, *layers = parameters
        out = []
        for place, pixels in enumerate(images):
            h = (pixels - low) / (high - low) - 0.5
            for weight, bias in zip(layers[::2], layers[1::2], strict=True):
                h = F.conv2d(h, weight[place], bias[place], padding=1)
                h = F.relu(h) if weight is not layers[-2] else h
            out.append(pixels + (high - low) * (maps[place] + h))
        return torch.stack(out).clamp(low, high)

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        """Only pixels are bounded."""

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        """Root mean square of the map, as a share of the range."""
        return parameters[0].flatten(1).square().mean(1).sqrt()

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        return torch.zeros(len(parameters[0]))


@dataclass(frozen=True, eq=False)
class Replayed:
    """What the replayed trigger makes the network answer, and the trigger."""

    probe: Probe
    share: float
    """Share of the clean images that it moves to ``probe.target``."""
    agreement: float
    """Cosine of the norms' shift and what the trigger did to them in the last step, nuisances
    taken out."""


def replay(
    shift: NormShift,
    images: Tensor,
    labels: Tensor,
    config: ReplayConfig,
    *,
    steps: int,
    valid: Range,
    seed: int,
    ledger: Ledger,
    against: tuple[Probe, Tensor] | None = None,
) -> Replayed:
    """Learn one trigger on clean images float32 [N, C, H, W] with labels int64 [N].

    loss = |residual - p * effect|^2 / |residual|^2 [+ class_weight * cross-entropy to the target]

    with p, the share of poisoned images, assumed. No class is asked for; the target is the class
    that gains most. ``against``: (a replayed trigger, gates float32 [S]): go on from that trigger,
    whose target is now to be reached on the network so gated, while the effect is that on the
    network as it is. Costs 2 image-forwards an image and step, 4 against gates.
    """
    family = Replay("replay" if against is None else "replay+")
    random = torch.Generator().manual_seed(seed)
    network = shift.means.network
    device = network.device
    if against is None:
        shape = (images.shape[1], images.shape[2], images.shape[3])
        state = [p.to(device) for p in family.start(1, shape, random)]
        pool = torch.arange(len(images))
    else:
        state = [p.to(device, copy=True) for p in against[0].parameters]
        pool = (labels != against[0].target).nonzero().squeeze(1)
    for parameter in state:
        parameter.requires_grad_(True)
    rates = [family.learning_rate] + [family.learning_rate / 4] * (len(state) - 1)
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate} for p, rate in zip(state, rates, strict=True)],
        betas=(0.5, 0.9),
    )
    residual = shift.residual.to(device)
    agreement = 0.0
    for step in range(steps):
        index = pool[torch.randint(len(pool), (config.images_per_step,), generator=random)]
        triggered = family.apply(state, images[index][None].to(device), valid)[0]
        _, means = shift.means(triggered)
        effect = shift.explained((means - shift.clean[index].to(device)).mean(0))
        loss = (residual - config.poisoned * effect).square().sum() / residual.square().sum()
        if against is not None:
            probe, gates = against
            wanted = torch.full((len(index),), probe.target, device=device)
            reached = F.cross_entropy(network(triggered, gates), wanted)
            loss = loss + config.class_weight * reached
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agreement = float(F.cosine_similarity(residual, effect.detach(), dim=0))
        ledger.count((2 if against is None else 4) * len(index))
        ledger.tick(step + 1, steps, f"agreement {agreement:.2f}")
    parameters = [parameter.detach().cpu() for parameter in state]
    size = float(family.size(parameters, valid))
    target = -1 if against is None else against[0].target  # -1: not known yet
    probe = Probe(family, target, parameters, valid, size)
    gain = _answers(network, probe(images)) - _answers(network, images)
    ledger.count(2 * len(images))
    if against is None:
        probe = replace(probe, target=int(gain.argmax()))
    return Replayed(probe, float(gain[probe.target]) / len(images), agreement)


@torch.no_grad()
def _answers(network: FrozenNetwork, images: Tensor) -> Tensor:
    """How many of the images [N, C, H, W] get each answer, int64 [K]."""
    answers = [network(part).argmax(1).cpu() for part in images.split(BATCH)]
    return torch.bincount(torch.cat(answers), minlength=network.trace.num_classes)
