"""Weights of the policy as safetensors: what ``bench.train_agent`` makes, and what comes along."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onp.agent.policy import PruningPolicy
from onp.agent.state import State
from onp.config import SHIPPED
from onp.errors import UsageError
from onp.features import NAMES
from onp.files import write_atomically

_OURS = Path(__file__).with_name("policy.safetensors")
"""What comes along; its card (data, date, command, scores) lies beside it."""


def load_policy(name: str | Path) -> PruningPolicy:
    """A policy from its file, or the ``SHIPPED`` one. Raises UsageError for a missing file, another
    network's, or one that was taught on other features."""
    path = _OURS if name == SHIPPED else Path(name)
    try:
        weights = load_file(path)
        hidden, columns = weights["embed.weight"].shape
        rounds = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
        relations = weights["layers.0.mix.weight"].shape[1] // hidden - 1 if rounds else 0
        policy = PruningPolicy(columns - State.INPUTS, relations, rounds=rounds, seed=0)
        policy.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UsageError(f"{path} holds no weights of a policy: {error}") from error
    if columns - State.INPUTS != len(NAMES):
        raise UsageError(
            f"{path} reads {columns - State.INPUTS} features of a site, there are {len(NAMES)}: "
            "teach it again"
        )
    return policy.eval()


def save_policy(policy: PruningPolicy, path: Path) -> None:
    """Write a policy's weights as safetensors."""
    state = {name: value.detach().contiguous() for name, value in policy.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(state, temporary))
