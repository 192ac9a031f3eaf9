"""The state of the search: a mask, and what flips of it would lead on to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onp.agent.effects import Effects

UNIT = 0.02
"""Nats an image: gains are compared as asinh(gain / UNIT), linear around nothing and logarithmic
beyond."""


@dataclass(frozen=True)
class State:
    """A mask and what flips would lead on to."""

    inputs: Tensor
    """float32 [S, INPUTS], of size about one; the last column is the mask's."""
    effects: Effects
    """Uncorrected."""

    INPUTS = 7

    @classmethod
    def of(cls, pruned: Tensor, effects: Effects) -> State:
        """Of a mask bool [S], on the effects' device."""
        changes = (effects.clean_change, effects.triggered_change)
        cautious = effects.scaled()
        gains = effects.gains(cautious.clean_change, cautious.triggered_change)
        columns = [torch.asinh(gain / UNIT) for gain in gains]
        columns += [torch.asinh(change.square().mean(0).sqrt() / 0.3) for change in changes]
        columns += [torch.asinh(change.mean(0) / 0.3) for change in changes]
        own = pruned.to(effects.price.device, torch.float32)[:, None]
        return cls(torch.cat([torch.stack(columns, 1) / 2, own], 1), effects)
