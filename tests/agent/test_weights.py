"""Weights of a policy on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onp.agent import weights
from onp.agent.policy import PruningPolicy
from onp.agent.state import State
from onp.agent.weights import load_policy, save_policy
from onp.config import SHIPPED
from onp.errors import UsageError
from onp.features import NAMES


@pytest.mark.parametrize("rounds", [0, 2])
def test_weights_come_back(rounds: int, tmp_path: Path) -> None:
    policy = PruningPolicy(len(NAMES), 3, rounds=rounds, seed=1)
    save_policy(policy, tmp_path / "w.safetensors")
    read = load_policy(tmp_path / "w.safetensors").state_dict()
    assert read.keys() == policy.state_dict().keys()
    assert all(torch.equal(value, read[name]) for name, value in policy.state_dict().items())


def test_a_policy_comes_along_with_its_card() -> None:
    policy = load_policy(SHIPPED)
    assert policy.embed.weight.shape[1] == len(NAMES) + State.INPUTS
    card = json.loads(Path(weights.__file__).with_name("policy.json").read_text())
    assert {"date", "command", "taught_on_networks", "mean_worth"} <= card.keys()


def test_weights_that_are_not_there_or_no_policy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(UsageError, match="holds no weights"):
        load_policy(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(UsageError, match="holds no weights"):
        load_policy(path)


def test_a_policy_of_other_features_is_refused(tmp_path: Path) -> None:
    save_policy(PruningPolicy(6, 3, rounds=1, seed=1), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=f"reads 6 features of a site, there are {len(NAMES)}"):
        load_policy(tmp_path / "w.safetensors")
