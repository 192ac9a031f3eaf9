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
from onp.probes.gradients import pixel_gradients
from onp.probes.low_frequency import LowFrequency
from onp.probes.patch import Patch
from onp.probes.probe import Probe, Target, answers_of
from onp.probes.warp import Warp
from onp.suspect.network import FrozenNetwork

FAMILIES: tuple[Family, ...] = (Patch(), Additive(), LowFrequency(), Warp())


def towards(logits: Tensor, answers: Tensor) -> Tensor:
    """The loss of images that are to get the answers int64 [N], logits [N, K]: summed."""
    return F.cross_entropy(logits, answers, reduction="sum")


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
        logits, gradients = pixel_gradients(network, pixels, answers, towards, gates)
        success = (logits.argmax(1) == answers).float().view(-1, draw).mean(1)
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
