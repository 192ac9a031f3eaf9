"""Weights into named networks and into the user's own, with trust asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onp.errors import UnsafeOrCorruptModel, UsageError
from onp.suspect import architectures
from onp.suspect.files import save_weights
from onp.suspect.load import load_suspect
from onp.suspect.matching import load_by_name

FACTORY = """
from torch import nn

print("imported")
not_callable = 3


def net():
    return nn.Linear(3, 2).half()


def sized(inputs=1, outputs=1):
    return nn.Linear(inputs, outputs)

def broken():
    raise RuntimeError("no network today")


def not_a_module():
    return 7
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_weights(tmp_path / "m.pt", nn.Linear(3, 2).half().state_dict())
    return tmp_path / "m.pt"


@pytest.fixture(autouse=True)
def _factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_networks.py").write_text(FACTORY)
    (tmp_path / "user_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "user_networks", raising=False)


def test_named_network(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(arch: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
        assert arch == "linear"
        model = nn.Linear(3, 2).eval()
        load_by_name(model, state_dict)
        return model

    with pytest.raises(UsageError, match="unknown architecture 'linear'"):
        load_suspect(weights.with_name("missing.pt"), "linear")  # before the file is read
    monkeypatch.setattr(architectures, "build", build)
    monkeypatch.setattr(architectures, "_BUILDERS", {"linear": build})
    suspect = load_suspect(weights, "linear")
    assert suspect.arch == "linear"
    assert suspect.file.path == weights
    torch.testing.assert_close(
        suspect.model.state_dict()["weight"], suspect.file.state_dict["weight"].float()
    )


def test_factory(weights: Path) -> None:
    suspect = load_suspect(weights, "user_networks:net", trust=True)
    assert suspect.model.weight.dtype == torch.float32
    assert not suspect.model.training


@pytest.mark.parametrize(
    "arch",
    ["user_networks:sized(3, outputs=2)", "user_networks:sized(outputs = 2, inputs = 3)"],
)
def test_factory_with_arguments(weights: Path, arch: str) -> None:
    suspect = load_suspect(weights, arch, trust=True)
    assert suspect.model.weight.shape == (2, 3)
    assert suspect.arch == arch


@pytest.mark.parametrize(
    "arguments",
    [
        "(print('run'))",
        "(3, *[2])",
        "(**{'inputs': 3})",
        "(3,, 2)",
        "(3))((2)",
        "(3)(2)",
        "(3).x(2)",
        "({[1]: 2})",
        "(inputs=1, inputs=2)",
    ],
)
def test_a_factorys_arguments_are_literals(
    weights: Path, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="arguments must be numbers, strings"):
        load_suspect(weights, f"user_networks:sized{arguments}", trust=True)
    assert "run" not in capsys.readouterr().out


def test_factory_with_wrong_arguments(weights: Path) -> None:
    with pytest.raises(UsageError, match=r"failed: TypeError: .*'colour'"):
        load_suspect(weights, "user_networks:sized(colour='red')", trust=True)


def test_factory_needs_trust(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"runs that module's code; add --trust"):
        load_suspect(weights, "user_networks:net")
    assert "imported" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("user_networks:broken", "failed: RuntimeError: no network today"),
        ("user_networks:not_a_module", "must return a torch.nn.Module, got int"),
        ("user_networks:not_callable", "has no callable not_callable"),
        ("user_networks:missing", "has no callable missing"),
        ("user_broken:net", "importing user_broken failed: ZeroDivisionError"),
        ("no_such_module:net", "importing no_such_module failed: ModuleNotFoundError"),
    ],
)
def test_factory_errors(weights: Path, arch: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_suspect(weights, arch, trust=True)


def test_factory_of_another_network(tmp_path: Path) -> None:
    save_weights(tmp_path / "m.pt", nn.Linear(4, 2).state_dict())
    with pytest.raises(
        UnsafeOrCorruptModel, match=r"'weight' is \[2, 4\], the network's is \[2, 3\]"
    ):
        load_suspect(tmp_path / "m.pt", "user_networks:net", trust=True)


def test_missing_arch_lists_the_names(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "NAMES", ("one", "two"), raising=False)
    with pytest.raises(UsageError, match="--arch is missing: one of one, two, or package"):
        load_suspect(weights)
