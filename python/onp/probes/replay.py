"""Replay what the batch norms remember: triggers of every kind that explain their shift.

Synthesis looks for a trigger that reaches a class. A replay looks for one that moves the norms'
moments as training did (``norm_shift``); no class is asked for, a backdoored network then answers
the attacker's. Many triggers explain the shift about as well, and the attacker's is one of them: so
several are learned, of different families, and each only until what is left of the shift is no more
than what chance and augmentation leave of it (the discrepancy principle, Morozov 1966). Beyond
that they would fit what the trigger has not done.

An all-to-all backdoor answers no one class; so it is asked whether some trigger can explain the
shift and move every label by one (``LabelShift``), on images that it was not learned on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.clean import Clean
from onp.config import ReplayConfig
from onp.ledger import Ledger
from onp.optimizers import Adam
from onp.probes.families import Family, Range
from onp.probes.norm_shift import BATCH, NormShift
from onp.probes.probe import Probe, Target
from onp.suspect.network import FrozenNetwork


@dataclass(frozen=True, eq=False)
class Replayed:
    """A trigger that replays the shift, and what it makes the network answer."""

    probe: Probe
    share: float
    """Share of the clean images that it moves to what ``probe`` is after; of images that it was
    not learned on where that was given."""
    agreement: float
    """Cosine of the norms' shift and what the trigger did to them in the last step, nuisances
    taken out."""


def replay(
    shift: NormShift,
    clean: Clean,
    config: ReplayConfig,
    family: Family,
    *,
    target: Target | None = None,
    valid: Range,
    seed: int,
    ledger: Ledger,
) -> Replayed:
    """Learn one trigger on the clean images, the first of which the shift was measured on.

    loss = |residual - p * effect|^2 / |residual|^2 [+ target_weight * cross-entropy to the target]

    with p the assumed share of poisoned images. Without a ``target`` none is asked for: it is
    the class that gains most, and learning stops once a running mean of the loss (from 1, weight
    .2) is (least_excess / excess)^2, which is what a clean network's shift would leave of it, or
    ``enough``; ``judged`` images then say what it reaches. With one the trigger is judged on
    the last ``held_back`` of the images and learned on others. Costs 2 image-forwards an image and
    step.
    """
    random = torch.Generator().manual_seed(seed)
    network = shift.moments.network
    device = network.device
    shift, clean = shift.to(device), clean.to(device)
    images, labels, before = clean.images, clean.labels, clean.answers
    shape = (images.shape[1], images.shape[2], images.shape[3])
    state = [parameter.to(device) for parameter in family.start(1, shape, random)]
    for parameter in state:
        parameter.requires_grad_(True)
    optimizer = Adam((state, family.learning_rate), betas=(0.5, 0.9))

    def found(target: Target) -> Probe:
        parameters = [parameter.detach().cpu() for parameter in state]
        return Probe(family, target, parameters, valid, float(family.size(parameters, valid)))

    held_back = 0 if target is None else round(config.held_back * len(images))
    learned_on = min(len(shift.clean), len(images) - held_back)
    aim = None if target is None else found(target).wanted(labels)
    residual = shift.residual
    enough = (
        0.0 if aim is not None else max((config.least_excess / shift.excess) ** 2, config.enough)
    )
    unexplained, agreement = 1.0, 0.0
    for step in range(config.steps):
        index = torch.randint(learned_on, (config.images_per_step,), generator=random).to(device)
        triggered = family.apply(state, images[index][None], valid)[0]
        logits, moments = shift.moments(triggered)
        effect = shift.explained((moments - shift.clean[index]).mean(0))
        loss = (residual - config.poisoned * effect).square().sum() / residual.square().sum()
        alike = F.cosine_similarity(residual, effect.detach(), dim=0)
        told = torch.stack([loss.detach(), alike])
        if aim is not None:
            reached = F.cross_entropy(logits, aim[index])
            loss = loss + config.target_weight * reached
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left, agreement = told.tolist()
        unexplained = 0.8 * unexplained + 0.2 * left
        ledger.count(2 * len(index))
        ledger.tick(step + 1, config.steps, f"agreement {agreement:.2f}")
        if unexplained <= enough:
            break
    judging = slice(-held_back, None) if held_back else slice(config.judged)
    judged, own, before = images[judging], labels[judging], before[judging]
    probe = found(0 if target is None else target)
    after = answers(network, probe(judged))
    ledger.count(len(judged))
    if target is None:
        classes = network.trace.num_classes
        gain = torch.bincount(after, minlength=classes) - torch.bincount(before, minlength=classes)
        probe = found(int(gain.argmax()))
    wanted = probe.wanted(own)
    share = float(((after == wanted).float() - (before == wanted).float()).mean())
    return Replayed(probe, share, agreement)


@torch.no_grad()
def answers(network: FrozenNetwork, images: Tensor) -> Tensor:
    """Answers int64 [N] to images [N, C, H, W], on the network's device."""
    return torch.cat([network(part).argmax(1) for part in images.split(BATCH)])
