"""Replay what the batch norms remember: triggers of every kind that explain their shift.

Synthesis looks for a trigger that reaches a class. A replay looks for one that moves the norms'
moments as training did (``norm_shift``); no class is asked for, a backdoored network then answers
the attacker's. Many triggers explain the shift about as well, and the attacker's is one of them: so
several are learned, of different families, and each only until what is left of the shift is no more
than what chance and augmentation leave of it (the discrepancy principle, Morozov 1966). Beyond
that they would fit what the trigger has not done.

Where an attacker has taught several triggers, of a class each, the images that such a trigger moves
come to all of these classes. Then one is learned for each of them, and together they explain it.

An all-to-all backdoor answers no one class; so it is asked whether some trigger can explain the
shift and move every label by one (``LabelShift``), on images that it was not learned on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.clean import Clean
from onp.config import ReplayConfig
from onp.ledger import Ledger
from onp.optimizers import Adam
from onp.probes.families import Family, Range
from onp.probes.norm_shift import BATCH, NormShift
from onp.probes.probe import Probe, Target, answers_of
from onp.suspect.network import FrozenNetwork


@dataclass(frozen=True, eq=False)
class Replayed:
    """A trigger that replays the shift, and what it makes the network answer."""

    probe: Probe
    share: float
    """Share of the clean images that it moves to what ``probe`` is after; of images that it was
    not learned on where that was given."""
    agreement: float
    """Cosine of the norms' shift and what the trigger (those that were learned together) did to
    them in the last step, nuisances taken out."""
    gains: Tensor
    """Share of the same images that each class gains, float32 [K]."""
    unexplained: float
    """Share of the shift's square that the trigger (those that were learned together) leaves, as a
    running mean over its steps, from 1."""


def replay(
    shift: NormShift,
    clean: Clean,
    config: ReplayConfig,
    family: Family,
    *,
    targets: Sequence[Target] = (),
    valid: Range,
    seed: int,
    ledger: Ledger,
) -> list[Replayed]:
    """Learn one trigger on the clean images, the first of which the shift was measured on, or one
    for each of the ``targets``, each on its share of a step's images, that explain it together.

    loss = |residual - p * effect|^2 / |residual|^2 [+ target_weight * cross-entropy to the targets]

    with p the assumed share of poisoned images. Without ``targets`` none is asked for: it is
    the class that gains most, and learning stops once a running mean of the first term (from 1,
    weight .2) is (least_excess / excess)^2, which is what a clean network's shift would leave of
    it, or ``enough``; ``judged`` images then say what it reaches. With one target the trigger is
    judged on the last ``held_back`` of the images and learned on others, to the last step. With
    several the weight is ``apart_weight``, and all else as without one. Costs 2 image-forwards an
    image and step.
    """
    random = torch.Generator().manual_seed(seed)
    network = shift.moments.network
    device = network.device
    shift, clean = shift.to(device), clean.to(device)
    images, labels = clean.images, clean.labels
    shape = (images.shape[1], images.shape[2], images.shape[3])
    count = max(1, len(targets))
    state = [parameter.to(device) for parameter in family.start(count, shape, random)]
    for parameter in state:
        parameter.requires_grad_(True)
    optimizer = Adam((state, family.learning_rate), betas=(0.5, 0.9))

    asked = len(targets) == 1
    held_back = round(config.held_back * len(images)) if asked else 0
    learned_on = min(len(shift.clean), len(images) - held_back)
    aims = torch.stack([answers_of(target, labels) for target in targets]) if targets else None
    weight = config.target_weight if asked else config.apart_weight
    residual = shift.residual
    enough = 0.0 if asked else max((config.least_excess / shift.excess) ** 2, config.enough)
    unexplained, agreement = 1.0, 0.0
    drawn = count, max(1, config.images_per_step // count)
    for step in range(config.steps):
        index = torch.randint(learned_on, drawn, generator=random).to(device)
        triggered = family.apply(state, images[index], valid).flatten(0, 1)
        logits, moments = shift.moments(triggered)
        effect = shift.explained((moments - shift.clean[index.flatten()]).mean(0))
        loss = (residual - config.poisoned * effect).square().sum() / residual.square().sum()
        alike = F.cosine_similarity(residual, effect.detach(), dim=0)
        told = torch.stack([loss.detach(), alike])
        if aims is not None:
            reached = F.cross_entropy(logits, aims.gather(1, index).flatten())
            loss = loss + weight * reached
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left, agreement = told.tolist()
        unexplained = 0.8 * unexplained + 0.2 * left
        ledger.count(2 * index.numel())
        ledger.tick(step + 1, config.steps, f"agreement {agreement:.2f}")
        if unexplained <= enough:
            break
    judging = slice(-held_back, None) if held_back else slice(config.judged)
    judged = clean[judging]
    return [
        _replayed(
            network, family, [p.detach()[one : one + 1] for p in state],
            targets[one] if targets else None, agreement, unexplained, judged, valid, ledger,
        )
        for one in range(count)
    ]  # fmt: skip


def _replayed(
    network: FrozenNetwork,
    family: Family,
    state: Sequence[Tensor],
    target: Target | None,
    agreement: float,
    unexplained: float,
    judged: Clean,
    valid: Range,
    ledger: Ledger,
) -> Replayed:
    """The trigger and what it does to the images ``judged``; its target, where none was asked for,
    is the class that gains most."""
    parameters = [parameter.cpu().clone() for parameter in state]
    size = float(family.size(parameters, valid))
    probe = Probe(family, 0 if target is None else target, parameters, valid, size)
    after, before = answers(network, probe(judged.images)), judged.answers
    ledger.count(len(judged))
    classes = network.trace.num_classes
    gains = torch.bincount(after, minlength=classes) - torch.bincount(before, minlength=classes)
    if target is None:
        probe = replace(probe, target=int(gains.argmax()))
    wanted = probe.wanted(judged.labels)
    share = float(((after == wanted).float() - (before == wanted).float()).mean())
    return Replayed(probe, share, agreement, gains.cpu() / len(judged), unexplained)


@torch.no_grad()
def answers(network: FrozenNetwork, images: Tensor) -> Tensor:
    """Answers int64 [N] to images [N, C, H, W], on the network's device."""
    return torch.cat([network(part).argmax(1) for part in images.split(BATCH)])
