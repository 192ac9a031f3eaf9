"""What attacks need from the surrogate classifier and from networks of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights take no gradients; the original stays as it is."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def seeded(build: Callable[[], Network], seed: int) -> Network:
    """A network whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def prefixed_state(**networks: nn.Module) -> dict[str, Tensor]:
    """All weights under ``<name>.<key>``, on the CPU."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def load_prefixed(state: dict[str, Tensor], **networks: nn.Module) -> None:
    """What ``prefixed_state`` gave, back into networks of the same names."""
    for name, network in networks.items():
        start = f"{name}."
        own = {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
        network.load_state_dict(own)
