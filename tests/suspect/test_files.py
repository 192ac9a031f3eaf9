"""Hostile, damaged and odd files through the one door, and the benign ones that must pass."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from onp.errors import OnpError, UnsafeOrCorruptModel, UnsupportedInput, UsageError
from onp.suspect.files import read_weights, save_weights


def _weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict())


def _torch_bytes(value: object, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _rezipped(
    data: bytes,
    change: Callable[[zipfile.ZipInfo, bytes], tuple[str, bytes]] | None = None,
    compression: int = zipfile.ZIP_STORED,
    extra: tuple[str, bytes] | None = None,
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for info in old.infolist():
            name, content = info.filename, old.read(info)
            if change is not None:
                name, content = change(info, content)
            new.writestr(name, content)
        if extra is not None:
            new.writestr(*extra)
    return stream.getvalue()


FORMATS = {
    "torch-zip": lambda weights: _torch_bytes(weights),
    "torch-legacy": lambda weights: _torch_bytes(weights, legacy=True),
    "safetensors": lambda weights: safetensors.torch.save(weights),
}


def _assert_same(loaded: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    assert loaded.keys() == weights.keys()
    for key, tensor in weights.items():
        assert loaded[key].dtype == tensor.dtype
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0)


# ---- what must pass


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("loader", FORMATS)
def test_formats_are_told_by_content(tmp_path: Path, loader: str, suffix: str) -> None:
    data = FORMATS[loader](_weights())
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    suspect = read_weights(path)
    assert suspect.loader == loader
    assert suspect.path == path
    assert suspect.sha256 == hashlib.sha256(data).hexdigest()
    _assert_same(suspect.state_dict, _weights())


@pytest.mark.parametrize("loader", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, loader: str, dtype: torch.dtype) -> None:
    weights = {"fc.weight": torch.ones(2, 3, dtype=dtype)}
    (tmp_path / "m").write_bytes(FORMATS[loader](weights))
    _assert_same(read_weights(tmp_path / "m").state_dict, weights)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model_state", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_training_checkpoints_are_unwrapped(
    tmp_path: Path, key: str, prefix: str, legacy: bool
) -> None:
    nested = OrderedDict((prefix + name, tensor) for name, tensor in _weights().items())
    checkpoint = {
        "epoch": 7,
        "loss": torch.tensor(0.5),
        "name": "run",
        "opt": {"lr": 1},
        key: nested,
    }
    (tmp_path / "m.pt").write_bytes(_torch_bytes(checkpoint, legacy))
    _assert_same(read_weights(tmp_path / "m.pt").state_dict, _weights())


def test_doubly_nested_and_tied_and_sliced(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    weights = {"a": whole, "b": whole, "c": whole.t(), "d": whole[:, 1:], "e": nn.Parameter(whole)}
    (tmp_path / "m.pt").write_bytes(_torch_bytes({"model": {"state_dict": weights}}))
    loaded = read_weights(tmp_path / "m.pt").state_dict
    _assert_same(loaded, {key: tensor.detach() for key, tensor in weights.items()})
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in loaded.values())


def test_header_length_that_looks_like_a_pickle(tmp_path: Path) -> None:
    weights = {"w": torch.ones(3)}
    data = safetensors.torch.save(weights, {"note": "x" * 556})  # a header of 640 bytes
    assert data[:2] == b"\x80\x02"
    (tmp_path / "m").write_bytes(data)
    _assert_same(read_weights(tmp_path / "m").state_dict, weights)


def test_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(_torch_bytes(_weights()))
    (tmp_path / "model.pt").symlink_to("blob")
    assert read_weights(str(tmp_path / "model.pt")).loader == "torch-zip"


def test_save_weights_round_trip(tmp_path: Path) -> None:
    weights = _weights()
    tied = weights | {"tied": weights["0.weight"], "view": weights["0.weight"].permute(1, 0, 2, 3)}
    save_weights(tmp_path / "out.safetensors", tied, {"tool": "onp"})
    _assert_same(read_weights(tmp_path / "out.safetensors").state_dict, tied)
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"tool": "onp"}


# ---- paths


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    metadata = dict.fromkeys(("onp", "arch", "suspect_sha256", "ü"), "x")
    written = set()
    for _ in range(20):
        save_weights(tmp_path / "w.safetensors", {"a": torch.arange(3.0)}, metadata)
        written.add((tmp_path / "w.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert file.get_tensor("a").tolist() == [0, 1, 2]


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"cannot read .*missing: No such file"):
        read_weights(tmp_path / "missing")
    with pytest.raises(UsageError, match="is a directory"):
        read_weights(tmp_path)
    with pytest.raises(UsageError, match="not a regular file"):
        read_weights(tmp_path / "pipe")
    with pytest.raises(UsageError, match="null byte"):
        read_weights("a\0b")


def test_permission_and_read_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("onp.suspect.files.os.open", fail)
    with pytest.raises(UsageError, match="Permission denied"):
        read_weights(tmp_path / "m.pt")


def test_size_limit(tmp_path: Path) -> None:
    data = _torch_bytes(_weights())
    (tmp_path / "m.pt").write_bytes(data)
    read_weights(tmp_path / "m.pt", max_bytes=len(data))
    with pytest.raises(UnsafeOrCorruptModel, match="more than the limit"):
        read_weights(tmp_path / "m.pt", max_bytes=len(data) - 1)


def test_views_of_one_storage_count_each(tmp_path: Path) -> None:
    weights = dict.fromkeys("abcdefghijklmnopqrst", torch.zeros(1000))
    (tmp_path / "m.pt").write_bytes(_torch_bytes(weights))
    with pytest.raises(UnsafeOrCorruptModel, match="the tensors take 80000 bytes"):
        read_weights(tmp_path / "m.pt", max_bytes=20_000)


# ---- content that is refused


class Payload:
    """Unpickled without care, this would make a directory."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("force", [False, True], ids=["plain", "forced by the environment"])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"state_dict": _weights(), "x": p}])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_payload_never_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    legacy: bool,
    wrap: Callable[[object], object],
    force: bool,
) -> None:
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    (tmp_path / "m.pt").write_bytes(_torch_bytes(wrap(Payload(canary)), legacy))
    with pytest.raises(UnsafeOrCorruptModel, match=r"m\.pt: refused.* wants 'posix\.mkdir'"):
        read_weights(tmp_path / "m.pt")
    assert not canary.exists()


def test_bare_pickle_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(UnsafeOrCorruptModel):
        read_weights(tmp_path / "m.pt")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (np.random.default_rng(0), "numpy"),
    ],
    ids=["namespace", "module", "numpy"],
)
def test_refusal_names_the_globals(tmp_path: Path, value: object, wanted: str) -> None:
    (tmp_path / "m.pt").write_bytes(_torch_bytes({"state_dict": _weights(), "other": value}))
    with pytest.raises(UnsafeOrCorruptModel, match=wanted):
        read_weights(tmp_path / "m.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_benchmarks_record_is_read(tmp_path: Path, zipped: bool) -> None:
    """What BackdoorBench saves beside the weights: numpy's numbers and arrays of them."""
    poisoned = {
        "bd_data_container": {"data_dict": {3: {"path": "3.png", "other_info": [0, 1]}}},
        "original_index_array": np.arange(5),
        "poison_indicator": np.zeros(9),
    }
    record = {
        "model_name": "preactresnet18", "num_classes": 10, "model": _weights(),
        "img_size": (32, 32, 3), "bd_train": None, "bd_test": poisoned, "acc": np.float64(0.9),
    }  # fmt: skip
    file = io.BytesIO()
    torch.save(record, file, _use_new_zipfile_serialization=zipped)
    (tmp_path / "attack_result.pt").write_bytes(file.getvalue())
    assert read_weights(tmp_path / "attack_result.pt").state_dict.keys() == _weights().keys()


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    record = {"model": _weights(), "other": np.array([1, None], dtype=object)}
    (tmp_path / "m.pt").write_bytes(_torch_bytes(record))
    with pytest.raises(UnsafeOrCorruptModel, match="refused"):
        read_weights(tmp_path / "m.pt")


def test_stride_bomb(tmp_path: Path) -> None:
    bomb = torch.zeros(1).as_strided((2**42,), (0,))
    (tmp_path / "m.pt").write_bytes(_torch_bytes({"fc.weight": bomb}))
    with pytest.raises(UnsafeOrCorruptModel, match=r"'fc\.weight' claims 17592186044416 bytes"):
        read_weights(tmp_path / "m.pt")


def test_deflate_bomb(tmp_path: Path) -> None:
    data = _rezipped(_torch_bytes({"w": torch.zeros(1 << 18)}), compression=zipfile.ZIP_DEFLATED)
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(UnsafeOrCorruptModel, match="is compressed"):
        read_weights(tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["archive/../x", "/etc/x", "..\\x", "archive/data/../../x"])
def test_members_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.pt").write_bytes(_rezipped(_torch_bytes(_weights()), extra=(name, b"")))
    with pytest.raises(UnsafeOrCorruptModel, match="points outside"):
        read_weights(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_doubled_member(tmp_path: Path) -> None:
    data = _rezipped(_torch_bytes(_weights()), extra=("archive/data.pkl", b""))
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(UnsafeOrCorruptModel, match="same name"):
        read_weights(tmp_path / "m.pt")


def test_local_name_must_be_the_directorys(tmp_path: Path) -> None:
    data = _torch_bytes(_weights()).replace(b"archive/version", b"archive/vErsion", 1)
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(UnsafeOrCorruptModel, match="differ"):
        read_weights(tmp_path / "m.pt")


def test_flipped_weight_bit_is_noticed(tmp_path: Path) -> None:
    marker = b"\x00\x00\x80\x3f" * 16
    data = bytearray(_torch_bytes({"w": torch.ones(16)}))
    data[data.index(marker) + 1] ^= 1
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(UnsafeOrCorruptModel, match="CRC-32"):
        read_weights(tmp_path / "m.pt")


def test_torchscript_layout(tmp_path: Path) -> None:
    data = _rezipped(_torch_bytes(_weights()), extra=("archive/constants.pkl", b""))
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(UnsafeOrCorruptModel, match="TorchScript"):
        read_weights(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", UnsafeOrCorruptModel, "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), UnsupportedInput, "neither safetensors nor"),
        (b"\x80", UnsupportedInput, "neither"),
        (b"\x80\x02", UnsafeOrCorruptModel, "damaged torch-legacy"),
        (b"PK\x03\x04" + bytes(99), UnsafeOrCorruptModel, "damaged torch-zip"),
        (struct.pack("<Q", 2**60) + b"{}", UnsafeOrCorruptModel, "a header of"),
        (struct.pack("<Q", 17 << 20) + b"{" * (17 << 20), UnsafeOrCorruptModel, "a header of"),
        (struct.pack("<Q", 4) + b"{ab}", UnsafeOrCorruptModel, "damaged safetensors"),
    ],
    ids=["empty", "png", "one byte", "pickle", "zip", "huge header", "long header", "json"],
)
def test_damaged_content(tmp_path: Path, data: bytes, error: type[OnpError], message: str) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(error, match=message):
        read_weights(tmp_path / "m")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(1)], "holds 'list', not a state dict"),
        (torch.zeros(1), "holds 'Tensor', not a state dict"),
        ({}, "no weights"),
        ({"epoch": 3}, "no weights"),
        ({"state_dict": {}}, "no weights"),
        ({"model": {"model": {"model": {"model": {"model": {}}}}}}, "no weights"),
        ({"model": _weights(), "net": _weights()}, "several state dicts"),
        (_weights() | {"epoch": 3}, "'epoch' is int, not a tensor"),
        ({3: torch.zeros(1)}, "the key '3'"),
        ({"": torch.zeros(1)}, "the key ''"),
        ({"w": torch.eye(3).to_sparse()}, "'w' must be a dense tensor"),
        ({"w": torch.zeros(3, device="meta")}, "'w' must be a dense tensor"),
        ({"w": torch.zeros(3, dtype=torch.complex64)}, "unsupported type"),
        ({"w": torch.zeros(3).to(torch.float8_e4m3fn)}, "unsupported type"),
        ({"w": torch.tensor([1.0, float("nan")])}, "'w' holds NaN or infinite"),
        ({"w": torch.tensor([float("inf")], dtype=torch.float16)}, "'w' holds NaN or infinite"),
        ({"w": torch.tensor([1e300], dtype=torch.float64)}, "'w' holds NaN or infinite"),
        ({"bn.running_var": torch.tensor([1.0, -1e-9])}, "'bn.running_var' holds negative"),
    ],
)
def test_refused_values(tmp_path: Path, value: object, message: str) -> None:
    (tmp_path / "m.pt").write_bytes(_torch_bytes(value))
    with pytest.raises(UnsafeOrCorruptModel, match=message) as caught:
        read_weights(tmp_path / "m.pt")
    assert str(caught.value).startswith(str(tmp_path / "m.pt"))


def test_long_and_unprintable_keys_stay_one_short_line(tmp_path: Path) -> None:
    key = "\x1b[31m\n" + "k" * 1_000_000
    (tmp_path / "m.pt").write_bytes(_torch_bytes({key: torch.tensor(float("nan"))}))
    with pytest.raises(UnsafeOrCorruptModel) as caught:
        read_weights(tmp_path / "m.pt")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onp.suspect.state_dict.MAX_TENSORS", 3)
    (tmp_path / "m.safetensors").write_bytes(safetensors.torch.save(_weights()))
    with pytest.raises(UnsafeOrCorruptModel, match="entries are more than 3"):
        read_weights(tmp_path / "m.safetensors")


@pytest.mark.parametrize("loader", FORMATS)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_raise_only_our_errors(
    tmp_path: Path, loader: str, data: st.DataObject
) -> None:
    content = bytearray(FORMATS[loader](_weights()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "m").write_bytes(content)
    try:
        loaded = read_weights(tmp_path / "m").state_dict
    except (UnsafeOrCorruptModel, UnsupportedInput):
        return
    assert all(torch.isfinite(tensor).all() for tensor in loaded.values())
