"""Backdoor attacks from their papers: one class each, with one place for its formula."""

from __future__ import annotations

from bench.zoo.attacks.badnets import BadNets, BadNetsAllToAll
from bench.zoo.attacks.base import Attack, Knowledge, poison
from bench.zoo.attacks.blended import Blended

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack for attack in (BadNets, BadNetsAllToAll, Blended)
}

__all__ = ["ATTACKS", "Attack", "Knowledge", "poison"]
