"""Weights go to the parameters of the same name, or nowhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onp.errors import UnsafeOrCorruptModel
from onp.suspect.matching import load_by_name, wrapper_prefix


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        ([], ""),
        (["a", "module.b"], ""),
        (["module.a", "module.b.c"], "module."),
        (["_orig_mod.module.model.a", "_orig_mod.module.model.b"], "_orig_mod.module.model."),
        (["module.module.a"], "module.module."),
        (["model."], ""),
        (["encoder.a"], ""),
    ],
)
def test_wrapper_prefix(keys: list[str], prefix: str) -> None:
    assert wrapper_prefix(keys) == prefix


def test_order_does_not_matter() -> None:
    source, target = Net(), Net()
    load_by_name(target, dict(reversed(source.state_dict().items())))
    for key, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_widths_become_float32(dtype: torch.dtype) -> None:
    weights = {
        key: t.to(dtype) if t.is_floating_point() else t for key, t in Net().state_dict().items()
    }
    target = Net()
    load_by_name(target, weights)
    assert target.conv.weight.dtype == torch.float32
    torch.testing.assert_close(target.conv.weight, weights["conv.weight"].float(), rtol=0, atol=0)


def test_num_batches_tracked_may_be_missing() -> None:
    weights = Net().state_dict()
    del weights["norm.num_batches_tracked"]
    load_by_name(Net(), weights)


def test_prefixes_count_on_neither_side() -> None:
    weights = Net().state_dict()
    wrapped = Wrapped()
    load_by_name(wrapped, {f"module.{key}": tensor for key, tensor in weights.items()})
    torch.testing.assert_close(wrapped.model.conv.weight, weights["conv.weight"])


def test_misfits_are_listed_and_nothing_is_loaded() -> None:
    weights = Net(width=5).state_dict()
    del weights["conv.bias"]
    weights["extra\n"] = torch.zeros(2, dtype=torch.int64)
    target = Net()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(UnsafeOrCorruptModel) as caught:
        load_by_name(target, weights)
    message = str(caught.value)
    assert "missing: 'conv.bias' [4];" in message
    assert r"unexpected: 'extra\n' [2] int64;" in message
    assert "'conv.weight' is [5, 3, 3, 3], the network's is [4, 3, 3, 3]" in message
    assert "\n" not in message
    for key, tensor in before.items():
        torch.testing.assert_close(target.state_dict()[key], tensor, rtol=0, atol=0)


def test_long_lists_are_counted() -> None:
    with pytest.raises(UnsafeOrCorruptModel, match=r"'k4' \[1\] and 3 more"):
        load_by_name(nn.Identity(), {f"k{i}": torch.zeros(1) for i in range(8)})


def test_integers_are_no_weights() -> None:
    weights = Net().state_dict() | {"conv.bias": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(UnsafeOrCorruptModel, match=r"'conv.bias' is \[4\] int64"):
        load_by_name(Net(), weights)
