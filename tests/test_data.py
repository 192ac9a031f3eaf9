"""Every way clean data comes in, and every way it is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onp.data import ImageSet, Normalize, draw_balanced, gather, load_dataset
from onp.errors import BadData, UnsupportedInput, UsageError


def pixels(count: int, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "png")
    return data.getvalue()


def class_files(prefix: str = "") -> dict[str, bytes]:
    images = pixels(6)
    return {f"{prefix}{'ab'[i % 2]}/{i}.png": png(image) for i, image in enumerate(images)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    dataset = load_dataset(write_folder(tmp_path, class_files()))
    assert dataset.class_names == ("a", "b")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(dataset.images.numpy(), pixels(6)[[0, 2, 4, 1, 3, 5]])


def test_a_zip_with_splits(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (class_files("train/") | class_files("test/")).items():
            archive.writestr(name, data)
        archive.writestr("test/c/9.png", png(pixels(1)[0]))
    assert len(load_dataset(path, "train")) == 6
    assert load_dataset(path, "test").class_names == ("a", "b", "c")
    with pytest.raises(BadData, match="no 'val' folder"):
        load_dataset(path, "val")


def test_a_split_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "flat", class_files())
    with pytest.raises(BadData, match="no train, test or val folder: leave 'test' out"):
        load_dataset(source, "test")
    np.savez(tmp_path / "d.npz", images=pixels(4), labels=np.arange(4))
    with pytest.raises(BadData, match="one set of images: leave the split 'train' out"):
        load_dataset(tmp_path / "d.npz", "train")
    # Where none is asked for, the usual one is taken if there is any.
    assert len(load_dataset(source, usual="test")) == 6
    both = class_files("train/") | {"test/a/9.png": png(pixels(1)[0])}
    parted = write_folder(tmp_path / "parted", both)
    assert len(load_dataset(parted)) == 6
    assert len(load_dataset(parted, usual="test")) == 1


def test_splits_by_other_names_are_not_mixed(tmp_path: Path) -> None:
    files = class_files("training/") | class_files("validation/")
    source = write_folder(tmp_path, files)
    with pytest.raises(BadData, match="class 'a' in training and in validation: give one of them"):
        load_dataset(source, "validation")
    assert len(load_dataset(source / "training")) == 6


def test_classes_may_lie_in_several_folders(tmp_path: Path) -> None:
    files = {"animals/cat/0.png": png(pixels(1)[0]), "things/car/0.png": png(pixels(1)[0])}
    assert load_dataset(write_folder(tmp_path, files)).class_names == ("car", "cat")


@pytest.mark.parametrize("kind", [np.uint16, np.float32, np.int32])
def test_images_of_more_than_eight_bits_are_refused(tmp_path: Path, kind: type) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((6, 5), 200, kind)).save(tmp_path / "a" / "0.tiff")
    (tmp_path / "a" / "0.tiff").rename(tmp_path / "a" / "0.png")  # read by content
    with pytest.raises(BadData, match="more than 8 bits a channel"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("count", [3, 6, 99])
@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_what_is_drawn_alone_is_decoded(tmp_path: Path, kind: str, count: int) -> None:
    source = write_folder(tmp_path / "folder", class_files())
    if kind == "zip":
        source = tmp_path / "data.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in class_files().items():
                archive.writestr(name, data)
    if kind == "npz":
        source = tmp_path / "d.npz"
        np.savez(source, images=pixels(6), labels=np.arange(6) % 2)
    whole = load_dataset(source)
    expected = draw_balanced(whole, min(count, 6), seed=4)
    drawn = load_dataset(source, draw=count, seed=4)
    assert torch.equal(drawn.images, expected.images)
    assert torch.equal(drawn.labels, expected.labels)
    assert drawn.class_names == whole.class_names
    if kind == "folder" and count < 6:
        taken = {image.numpy().tobytes() for image in drawn.images}
        for name, image in zip(class_files(), pixels(6), strict=True):
            if image.tobytes() not in taken:
                (source / name).write_bytes(b"no image")
        assert torch.equal(load_dataset(source, draw=count, seed=4).images, expected.images)


@pytest.mark.parametrize("draw", [0, -1])
def test_a_draw_of_nothing_is_refused(tmp_path: Path, draw: int) -> None:
    np.savez(tmp_path / "d.npz", images=pixels(6), labels=np.arange(6) % 2)
    for source in (write_folder(tmp_path / "folder", class_files()), tmp_path / "d.npz"):
        with pytest.raises(UsageError, match="positive"):
            load_dataset(source, draw=draw)


def test_a_class_has_a_name_or_a_number() -> None:
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    named = ImageSet(images, torch.arange(2), ("2", "stop"))
    assert [named.class_of(text) for text in ("stop", "2", "1")] == [1, 0, 1]
    with pytest.raises(UsageError, match=r"'halt' is no class number, nor .* \(2, stop\)"):
        named.class_of("halt")
    with pytest.raises(UsageError, match=r"target '-1' is no class number$"):
        ImageSet(images, torch.arange(2)).class_of("-1")


def test_npz(tmp_path: Path) -> None:
    images = pixels(4, 64, 64)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([3, 1, 0, 2], np.int16))
    dataset = load_dataset(tmp_path / "d.npz")
    assert dataset.images.shape == (4, 64, 64, 3)
    assert dataset.labels.tolist() == [3, 1, 0, 2]
    assert dataset.floats().shape == (4, 3, 64, 64)


@pytest.mark.parametrize(
    ("header", "labels"), [(1, [7, 0, 9]), (2, [99, 5, 40])], ids=["10", "100"]
)
def test_cifar_binary_batches(tmp_path: Path, header: int, labels: list[int]) -> None:
    images = pixels(3, 32, 32)
    records = [
        bytes([1] * (header - 1) + [label]) + image.transpose(2, 0, 1).tobytes()
        for label, image in zip(labels, images, strict=True)
    ]
    (tmp_path / "data_batch_1.bin").write_bytes(b"".join(records))
    (tmp_path / "test_batch.bin").write_bytes(records[0])
    dataset = load_dataset(tmp_path)
    assert dataset.labels.tolist() == labels
    assert np.array_equal(dataset.images.numpy(), images)
    assert len(load_dataset(tmp_path, "test")) == len(load_dataset(tmp_path, usual="test")) == 1
    with pytest.raises(BadData, match="none for 'val'"):
        load_dataset(tmp_path, "val")


def _one_size_off(root: Path) -> Path:
    write_folder(root, class_files())
    (root / "a" / "x.png").write_bytes(png(pixels(1, 9, 9)[0]))
    return root


def _damaged(root: Path) -> Path:
    return write_folder(root, {"a/1.png": b"\x89PNG not really"})


def _wrong_keys(root: Path) -> Path:
    np.savez(root / "d.npz", pictures=pixels(2))
    return root / "d.npz"


def _pickled(root: Path) -> Path:
    np.savez(root / "d.npz", images=np.array([{}], object), labels=np.array([0]))
    return root / "d.npz"


def _floats(root: Path) -> Path:
    np.savez(root / "d.npz", images=pixels(2) / 255.0, labels=np.array([0, 1]))
    return root / "d.npz"


def _no_records(root: Path) -> Path:
    (root / "data_batch_1.bin").write_bytes(b"12345")
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "missing", "not found"),
        (lambda root: root, "no images in class folders"),
        (_one_size_off, "must have one size"),
        (_damaged, "cannot decode a/1.png"),
        (_wrong_keys, "lacks images, labels"),
        (_pickled, "cannot read clean data"),
        (_floats, "images must be uint8"),
        (_no_records, "3073-byte"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_data_is_named(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadData, match=message):
        load_dataset(make(tmp_path))


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnsupportedInput, match="cannot tell what"):
        load_dataset(tmp_path / "notes.txt")


def test_draws_are_balanced_and_seeded() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    dataset = ImageSet(torch.zeros(83, 2, 2, 3, dtype=torch.uint8), labels)
    drawn = draw_balanced(dataset, 23, seed=1)
    assert torch.bincount(drawn.labels).tolist() == [10, 10, 3]
    numbered = ImageSet(
        torch.arange(83, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3), labels
    )
    first, again, other = (draw_balanced(numbered, 23, seed).images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(BadData, match="asked for 84"):
        draw_balanced(dataset, 84, seed=0)
    with pytest.raises(UsageError, match="positive"):
        draw_balanced(dataset, 0, seed=0)


def test_gather_takes_batches_items_and_arrays() -> None:
    batches = [
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])),
        (np.full((1, 3, 4, 4), 255, np.uint8), np.array([2])),
        (torch.ones(3, 4, 4), 3),
    ]
    images, labels = gather(batches)  # type: ignore[arg-type]
    assert images.shape == (4, 3, 4, 4)
    assert float(images[2].max()) == 1.0
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        ([torch.zeros(2, 3, 4, 4)], "pairs"),
        ([(torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64))], "labels"),
        ([(torch.zeros(2, 3, 4, 4), torch.zeros(2))], "integers"),
        (
            [(torch.zeros(1, 3, s, s), torch.zeros(1, dtype=torch.int64)) for s in (4, 5)],
            "one shape",
        ),
    ],
)
def test_gather_refuses(batches, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadData, match=message):
        gather(batches)


def test_normalize_needs_positive_deviations() -> None:
    with pytest.raises(UsageError, match="std > 0"):
        Normalize((0.5,), (0.0,))
