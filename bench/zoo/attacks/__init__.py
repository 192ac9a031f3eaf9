"""Backdoor attacks from their papers: one class each, with one place for its formula."""

from __future__ import annotations

from bench.zoo.attacks.adaptive_blend import AdaptiveBlend
from bench.zoo.attacks.badnets import BadNets, BadNetsAllToAll
from bench.zoo.attacks.base import Attack, Knowledge, poison
from bench.zoo.attacks.blended import Blended
from bench.zoo.attacks.bpp import Bpp
from bench.zoo.attacks.lf import LowFrequency
from bench.zoo.attacks.sig import Sig
from bench.zoo.attacks.wanet import WaNet

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        BadNets,
        BadNetsAllToAll,
        Blended,
        WaNet,
        Sig,
        LowFrequency,
        Bpp,
        AdaptiveBlend,
    )
}

__all__ = ["ATTACKS", "Attack", "Knowledge", "poison"]
