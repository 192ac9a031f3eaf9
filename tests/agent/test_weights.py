"""Weights of a policy on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onp.agent.policy import CautionPolicy
from onp.agent.weights import load_policy, save_policy
from onp.errors import UsageError


def a_policy(features: int, seed: int) -> CautionPolicy:
    return CautionPolicy(features, 3, hidden=8, rounds=1, seed=seed)


def test_weights_come_back(tmp_path: Path) -> None:
    one, other = a_policy(6, 0), a_policy(6, 1)
    assert not torch.equal(one.embed.weight, other.embed.weight)
    save_policy(one, tmp_path / "w.safetensors")
    load_policy(other, str(tmp_path / "w.safetensors"))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_weights_that_are_not_there_or_of_another_policy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(UsageError, match="holds no weights"):
        load_policy(a_policy(6, 0), str(path))
    save_policy(a_policy(5, 0), path)
    with pytest.raises(UsageError, match="holds no weights"):
        load_policy(a_policy(6, 0), str(path))
    path.write_bytes(b"no safetensors")
    with pytest.raises(UsageError, match="holds no weights"):
        load_policy(a_policy(6, 0), str(path))
