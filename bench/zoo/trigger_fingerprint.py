"""A few numbers that tell whether a trigger is still the one a network was trained with.

Cards keep them: attacks are code, and a formula that changes after the training would otherwise
score the network with a trigger that it has never seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.zoo.attacks import Attack
from onp.errors import OnpError
from onp.triggers import to_8_bits

TOLERANCE = 5e-4
"""Largest difference of any number, in units of the pixel range: what twenty values of the images
make that are rounded to the other multiple of 1/255."""

_IMAGES = 8
_CONTROL_POINTS = 8
_PROJECTIONS = 8
_DIGITS = 4


class TriggerChanged(OnpError):
    """The attack gives another trigger than the one that the network was trained with."""


def trigger_fingerprint(attack: Attack) -> list[float]:
    """Of ``attack(images) - images`` on fixed images: the mean absolute value, then projections.

    Each projection is the sum of all values under random signs over the square root of their
    count: about the trigger's root mean square, whatever its shape, and another number for each
    place, frequency or sign of the same shape. In units of the pixel range, rounded.
    """
    random = torch.Generator().manual_seed(0)
    images = _smooth_images(attack.size, random)
    change = (attack(images) - images).double().flatten()
    signs = torch.randint(0, 2, (_PROJECTIONS, change.numel()), generator=random).double() * 2 - 1
    projections = signs @ change / change.numel() ** 0.5
    numbers = [change.abs().mean().item(), *projections.tolist()]
    return [round(number, _DIGITS) for number in numbers]


def check_trigger(attack: Attack, kept: Sequence[float], card: str, remedy: str) -> None:
    """Raise TriggerChanged if ``kept``, the fingerprint of the card, is not the attack's."""
    now = trigger_fingerprint(attack)
    same = len(now) == len(kept)
    if not same or not all(abs(a - b) <= TOLERANCE for a, b in zip(now, kept, strict=True)):
        raise TriggerChanged(
            f"{card}: {attack.name} no longer gives the trigger that this network was trained "
            f"with; {remedy}"
        )


def _smooth_images(size: int, random: torch.Generator) -> Tensor:
    """Float [N, 3, size, size] in [0, 1], multiples of 1/255."""
    shape = (_IMAGES, 3, _CONTROL_POINTS, _CONTROL_POINTS)
    control = torch.randint(0, 256, shape, generator=random).float()
    return to_8_bits(F.interpolate(control, size=(size, size), mode="bilinear") / 255)
