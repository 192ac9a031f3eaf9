"""Synthesise triggers of every family for every suspected class, in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.ledger import Ledger
from onp.optimizers import Adam
from onp.probes.additive import Additive
from onp.probes.families import Family, Range
from onp.probes.low_frequency import LowFrequency
from onp.probes.patch import Patch
from onp.probes.probe import CPU_CHUNK, Probe, Target, answers_of
from onp.probes.warp import Warp
from onp.suspect.network import FrozenNetwork

FAMILIES: tuple[Family, ...] = (Patch(), Additive(), LowFrequency(), Warp())


def gradients_towards(
    network: FrozenNetwork, images: Tensor, answers: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which images [N, C, H, W] get the answers int64 [N], bool [N], and the gradients of the
    cross-entropy to them, summed, by the images."""
    right, gradients = [], []
    size = CPU_CHUNK if images.device.type == "cpu" else len(images)
    for part, wanted in zip(images.split(size), answers.split(size), strict=True):
        leaf = part.detach().requires_grad_(True)
        logits = network(leaf, gates)
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        gradients += torch.autograd.grad(loss, leaf)
        right.append(logits.argmax(1) == wanted)
    return torch.cat(right), torch.cat(gradients)


def synthesise(
    network: FrozenNetwork,
    images: Tensor,
    labels: Tensor,
    targets: Sequence[Target],
    *,
    steps: int,
    draw: int,
    valid: Range,
    seed: int,
    ledger: Ledger,
    gates: Tensor | None = None,
    families: Sequence[Family] = FAMILIES,
) -> list[Probe]:
    """Optimise one trigger per (family, target) on clean images [N, C, H, W] with labels [N].

    Each step draws, for every trigger, fresh images whose label is not its answer, runs all of them
    through the network and takes one Adam step on cross-entropy to the answers plus the family's
    size penalty, which counts more the better the trigger works. ``gates`` [S] prunes sites first.
    ``draw``: images that each trigger sees in a step.
    Costs ``2 * steps * draw`` image-forwards a trigger.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    device = network.device
    states = [
        [parameter.to(device) for parameter in family.start(len(targets), shape, random)]
        for family in families
    ]
    for state in states:
        for parameter in state:
            parameter.requires_grad_(True)
    optimizer = Adam(
        *((state, family.learning_rate) for family, state in zip(families, states, strict=True)),
        betas=(0.5, 0.9),
    )
    wanted = [answers_of(target, labels) for target in targets]
    others = [(labels != want).nonzero().squeeze(1) for want in wanted]
    for step in range(steps):
        rows = [o[torch.randint(len(o), (draw,), generator=random)] for o in others]
        batch = images[torch.stack(rows)].to(device)  # [targets, draw, C, H, W]
        answers = torch.cat([want[row] for want, row in zip(wanted, rows, strict=True)])
        answers = answers.repeat(len(families)).to(device)
        triggered = torch.cat(
            [f.apply(state, batch, valid) for f, state in zip(families, states, strict=True)]
        )  # [families * targets, draw, C, H, W], family-major
        pixels = triggered.flatten(0, 1)
        right, gradients = gradients_towards(network, pixels.detach(), answers, gates)
        success = right.float().view(-1, draw).mean(1)
        weight = ((success - 0.8) / 0.2).clamp(0.05, 1.0)
        penalties = torch.cat([f.penalty(state) for f, state in zip(families, states, strict=True)])
        optimizer.zero_grad()
        # One number: torch takes most of a second to import what it checks given gradients with.
        ((pixels * (gradients / draw)).sum() + (weight * penalties).sum()).backward()
        if step == steps * 3 // 4:
            optimizer.rates = [0.5 * rate for rate in optimizer.rates]  # settle
        optimizer.step()
        with torch.no_grad():
            for family, state in zip(families, states, strict=True):
                family.project(state, valid)
        ledger.count(2 * len(answers))
        ledger.tick(step + 1, steps)
    return [
        Probe(
            family,
            target,
            [parameter.detach()[i : i + 1].cpu().clone() for parameter in state],
            valid,
            float(family.size([p.detach()[i : i + 1] for p in state], valid)),
        )
        for family, state in zip(families, states, strict=True)
        for i, target in enumerate(targets)
    ]
