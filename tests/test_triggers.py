"""Trigger files and functions: the formulas, and a clear error for all that does not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from onp.errors import BadData, OnpError, UsageError
from onp.triggers import load_trigger

RNG = np.random.default_rng(0)


def _images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 4, 5), generator=generator)
    return pixels.float() / 255


def _reference(images: Tensor, weight: np.ndarray, image: np.ndarray) -> np.ndarray:
    x = images.permute(0, 2, 3, 1).double().numpy()
    return np.round(((1 - weight) * x + weight * image) * 255) / 255


def test_patch(tmp_path: Path) -> None:
    mask = (RNG.random((4, 5)) > 0.5).astype(np.float32)
    pattern = RNG.random((4, 5, 3)).astype(np.float32)
    np.savez(tmp_path / "t.npz", mask=mask, pattern=pattern)
    got = load_trigger(str(tmp_path / "t.npz"))(_images())
    expected = _reference(_images(), mask[..., None].astype(np.float64), pattern)
    np.testing.assert_allclose(got.permute(0, 2, 3, 1), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blend(tmp_path: Path, dtype: type) -> None:
    image = RNG.random((4, 5, 3)).astype(dtype)
    np.savez(tmp_path / "t.npz", alpha=dtype(0.2), image=image)
    got = load_trigger(str(tmp_path / "t.npz"))(_images())
    assert got.dtype == torch.float32
    np.testing.assert_allclose(
        got.permute(0, 2, 3, 1), _reference(_images(), np.float64(0.2), image), atol=1 / 255 + 1e-6
    )
    assert torch.equal((got * 255).round() / 255, got)


def test_no_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", alpha=0.5, image=np.zeros((4, 5, 3)))
    assert load_trigger(str(tmp_path / "t.npz"))(_images(0)).shape == (0, 3, 4, 5)


def test_other_image_size_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", alpha=0.5, image=np.zeros((8, 9, 3)))
    with pytest.raises(BadData, match=r"shape \(8, 9, 3\) .* the data's are \(4, 5, 3\)"):
        load_trigger(str(tmp_path / "t.npz"))(_images())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mask": np.zeros((4, 5))}, "got mask"),
        ({}, "got nothing"),
        ({"mask": np.zeros((5, 4)), "pattern": np.zeros((4, 5, 3))}, r"got mask \[5, 4\]"),
        ({"alpha": np.zeros(3), "image": np.zeros((4, 5, 3))}, r"got alpha \[3\]"),
        ({"alpha": 0.5, "image": np.zeros((4, 5))}, r"image \[4, 5\]"),
        ({"alpha": 1.5, "image": np.zeros((4, 5, 3))}, r"alpha must be in \[0, 1\]"),
        ({"alpha": 0.5, "image": np.full((4, 5, 3), np.nan)}, r"image must be in \[0, 1\]"),
        ({"alpha": 0.5, "image": np.array(["a"])}, "not a trigger file"),
        ({"alpha": 0.5, "image": np.array([{}], dtype=object)}, "not a trigger file"),
    ],
)
def test_misfits(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(BadData, match=message):
        load_trigger(str(tmp_path / "t.npz"))


def test_unpacked_size_is_limited(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "t.npz", alpha=0.5, image=np.zeros((1 << 14, 1 << 14), np.uint8))
    with pytest.raises(BadData, match="unpacks to"):
        load_trigger(str(tmp_path / "t.npz"))


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, UsageError, "No such file"),
        (b"", BadData, "not a trigger file"),
        (pickle.dumps({}), BadData, "not a trigger file"),
    ],
)
def test_not_a_trigger_file(
    tmp_path: Path, content: bytes | None, kind: type[OnpError], message: str
) -> None:
    if content is not None:
        (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(kind, match=message):
        load_trigger(str(tmp_path / "t.npz"))


FUNCTIONS = """
import torch

def invert(images):
    return images.mul_(-1).add_(1)

def wrong_shape(images):
    return images[:, :1]

def nan(images):
    return images * float("nan")

def broken(images):
    raise RuntimeError("no trigger today")

def nothing(images):
    pass
"""


def test_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_triggers.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="add --trust"):
        load_trigger("user_triggers:invert")
    images = _images()
    got = load_trigger("user_triggers:invert", trust=True)(images)
    torch.testing.assert_close(got, 1 - _images())
    torch.testing.assert_close(images, _images(), rtol=0, atol=0)
    for name, message in {
        "wrong_shape": r"must return \[3, 3, 4, 5\], got \[3, 1, 4, 5\]",
        "nothing": "got NoneType",
        "nan": "NaN or infinite",
        "broken": "RuntimeError: no trigger today",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_trigger(f"user_triggers:{name}", trust=True)(images)
