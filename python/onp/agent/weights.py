"""Weights of a policy as safetensors: what ``bench.train_agent`` fits and a policy starts from."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onp.agent.policy import CautionPolicy
from onp.errors import UsageError
from onp.files import write_atomically


def load_policy(policy: CautionPolicy, weights: str) -> CautionPolicy:
    """Fill a policy from a file. Raises UsageError for a missing file or another policy's."""
    try:
        policy.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"{weights} holds no weights of this policy: {error}") from error
    return policy


def save_policy(policy: CautionPolicy, path: Path) -> None:
    """Write a policy's weights as safetensors."""
    state = {name: value.detach().contiguous() for name, value in policy.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(state, temporary))
