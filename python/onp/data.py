"""Clean images in: read from a folder, zip, .npz or CIFAR batches; drawn; split; normalised."""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from onp.errors import BadData, UnsupportedInput, UsageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 4096 * 4096
"""Larger images are refused before they are decoded."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size."""

    images: Tensor
    """uint8 [N, H, W, 3]."""
    labels: Tensor
    """int64 [N]."""
    class_names: tuple[str, ...] = ()
    """Names of the classes where the source had them; label l is class_names[l]."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise BadData(
                f"images must be uint8 [N, H, W, 3], got {self.images.dtype} "
                f"{tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise BadData(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}"
            )
        if len(self.labels) and int(self.labels.min()) < 0:
            raise BadData(f"labels must not be negative, got {int(self.labels.min())}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index], self.class_names)

    def class_of(self, text: str) -> int:
        """The class of that name or, where there is none, of that number. Raises UsageError."""
        if text in self.class_names:
            return self.class_names.index(text)
        if text.isdecimal():
            return int(text)
        names = f", nor a class of the data ({', '.join(self.class_names)})"
        raise UsageError(f"target {text!r} is no class number{names if self.class_names else ''}")

    def floats(self) -> Tensor:
        """The images as float32 [N, 3, H, W] in [0, 1]."""
        return self.images.permute(0, 3, 1, 2).float().div_(255.0).contiguous()


# ---- reading ------------------------------------------------------------------------------------


def load_dataset(
    path: str | Path,
    split: str | None = None,
    *,
    usual: str = "train",
    draw: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Read labelled images.

    path: a folder or zip of class folders (classes numbered by sorted
    folder name, or by the name itself where all are numbers), an ``.npz``
    with ``images`` uint8 [N, H, W, 3] and ``labels`` [N], or a CIFAR-10/100 binary batch (file or
    folder). ``split`` picks ``train/``, ``test/`` or ``val/``, which must be there; without it
    ``usual`` is picked where there are such folders. ``draw``: at most so many images, those of
    ``draw_balanced`` with ``seed``; of folders and zips no others are decoded.
    Raises BadData or UnsupportedInput, naming the path.
    """
    path = Path(path)
    if draw is not None and draw < 1:
        raise UsageError(f"the number of clean images must be positive, got {draw}")
    if not path.exists():
        raise BadData(f"clean data not found: {path}")
    if split is not None and not path.is_dir() and path.suffix in (".npz", ".bin"):
        raise BadData(f"{path} is one set of images: leave the split {split!r} out")
    try:
        if path.is_dir():
            return _read_folder(path, split, usual, draw, seed)
        if path.suffix == ".npz":
            return _at_most(_read_npz(path), draw, seed)
        if path.suffix == ".bin":
            return _at_most(_read_cifar_binary([path]), draw, seed)
        if zipfile.is_zipfile(path):
            return _read_zip(path, split, usual, draw, seed)
    except BadData:
        raise
    except Exception as error:  # zip, image and array readers raise many kinds
        raise BadData(f"cannot read clean data from {path}: {error}") from error
    raise UnsupportedInput(
        f"cannot tell what {path} is: expected a folder or zip of class folders, an .npz with "
        "images and labels, or CIFAR binary batches (.bin)"
    )


def _at_most(dataset: ImageSet, draw: int | None, seed: int) -> ImageSet:
    if draw is None or not len(dataset):
        return dataset
    return draw_balanced(dataset, min(draw, len(dataset)), seed)


def _read_folder(
    root: Path, split: str | None, usual: str, draw: int | None, seed: int
) -> ImageSet:
    batches = sorted(root.glob("*.bin"))
    if batches:
        if split not in (None, "train", "test"):
            raise BadData(f"{root} has batches to train on and to test on, none for {split!r}")
        wanted = [b for b in batches if ("test" in b.name) == ((split or usual) == "test")]
        records = [b for b in wanted if not b.name.startswith("batches.meta")]
        return _at_most(_read_cifar_binary(records), draw, seed)
    names = [
        str(file.relative_to(root).as_posix())
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    ]
    return _read_class_folders(
        names, split, usual, lambda name: (root / name).read_bytes(), str(root), draw, seed
    )


def _read_zip(path: Path, split: str | None, usual: str, draw: int | None, seed: int) -> ImageSet:
    with zipfile.ZipFile(path) as archive:
        names = sorted(
            name
            for name in archive.namelist()
            if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES
        )
        return _read_class_folders(names, split, usual, archive.read, str(path), draw, seed)


def _read_class_folders(
    names: Sequence[str],
    split: str | None,
    usual: str,
    read: Callable[[str], bytes],
    source: str,
    draw: int | None,
    seed: int,
) -> ImageSet:
    """``names`` are slash-separated ``[.../][split/]class/file`` paths; ``read(name)`` -> bytes."""
    paths = [tuple(name.split("/")) for name in names]
    paths = [path for path in paths if len(path) >= 2 and not _is_hidden(path)]
    splits = {path[-3] for path in paths if len(path) >= 3}
    if splits & {"train", "test", "val"}:
        chosen = split or usual
        if chosen not in splits:
            raise BadData(f"{source} has no {chosen!r} folder, only {', '.join(sorted(splits))}")
        paths = [path for path in paths if len(path) >= 3 and path[-3] == chosen]
    else:
        _check_one_split(paths, source)
        if split is not None:
            raise BadData(f"{source} has no train, test or val folder: leave {split!r} out")
    if not paths:
        raise BadData(f"{source} holds no images in class folders (<class>/<image>.png)")
    class_names = tuple(sorted({path[-2] for path in paths}))
    if all(name.isdecimal() for name in class_names):  # folders are called by their label
        number, class_names = {name: int(name) for name in class_names}, ()
    else:
        number = {name: index for index, name in enumerate(class_names)}
    labels = torch.tensor([number[path[-2]] for path in paths])
    if draw is not None:
        order = balanced_order(labels, seed)[:draw]
        paths, labels = [paths[index] for index in order.tolist()], labels[order]
    images = np.stack(list(_decoded(["/".join(path) for path in paths], read, source)))
    return ImageSet(torch.from_numpy(images), labels, class_names)


def _check_one_split(paths: Sequence[tuple[str, ...]], source: str) -> None:
    """Raise BadData where a class has images in two folders: splits by other names than ours."""
    homes: dict[str, tuple[str, ...]] = {}
    for path in paths:
        home = homes.setdefault(path[-2], path[:-2])
        if home != path[:-2]:
            raise BadData(
                f"{source} has class {path[-2]!r} in {'/'.join(home) or '.'} and in "
                f"{'/'.join(path[:-2]) or '.'}: give one of them as the data"
            )


def _is_hidden(path: Sequence[str]) -> bool:
    """Files that systems leave beside a user's own: .DS_Store, __MACOSX/."""
    return any(part.startswith((".", "__MACOSX")) for part in path)


def _decoded(
    names: Sequence[str], read: Callable[[str], bytes], source: str
) -> Iterator[np.ndarray]:
    size: tuple[int, int] | None = None
    for name in names:
        try:
            with Image.open(io.BytesIO(read(name))) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadData(f"{source}: {name} has {image.width}x{image.height} pixels")
                if image.mode in ("I", "F") or image.mode.startswith("I;"):
                    raise BadData(
                        f"{source}: {name} has more than 8 bits a channel (mode {image.mode}): "
                        "save it with 8"
                    )
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            told = "it is no image" if isinstance(error, UnidentifiedImageError) else error
            raise BadData(f"{source}: cannot decode {name}: {told}") from error
        size = size or pixels.shape[:2]
        if pixels.shape[:2] != size:
            raise BadData(
                f"{source}: images must have one size, got {size[1]}x{size[0]} and "
                f"{pixels.shape[1]}x{pixels.shape[0]} ({name}); resize them first"
            )
        yield pixels


def _read_npz(path: Path) -> ImageSet:
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"images", "labels"} - set(arrays.files)
        if missing:
            raise BadData(f"{path} lacks {', '.join(sorted(missing))}; it has {arrays.files}")
        images, labels = arrays["images"], arrays["labels"]
    if not np.issubdtype(labels.dtype, np.integer):
        raise BadData(f"{path}: labels must be integers, got {labels.dtype}")
    if images.dtype != np.uint8:
        raise BadData(f"{path}: images must be uint8 [N, H, W, 3], got {images.dtype}")
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _read_cifar_binary(paths: Sequence[Path]) -> ImageSet:
    """CIFAR-10 records are 1 label byte + 3072 pixels; CIFAR-100's have a coarse label in front."""
    raw = [np.fromfile(path, np.uint8) for path in paths]
    if not raw or not all(len(part) for part in raw):
        raise BadData(f"no CIFAR records in {', '.join(map(str, paths)) or 'the folder'}")
    coarse = all(len(part) % 3074 == 0 for part in raw)
    if coarse and all(len(part) % 3073 == 0 for part in raw):
        coarse = any(part[::3073].max() > 9 for part in raw)  # CIFAR-10's labels are below 10
    record = 3074 if coarse else 3073
    if any(len(part) % record for part in raw):
        raise BadData(f"{paths[0]}: not CIFAR-10 (3073-byte) or CIFAR-100 (3074-byte) records")
    rows = np.concatenate([part.reshape(-1, record) for part in raw])
    pixels = rows[:, record - 3072 :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = rows[:, record - 3073].astype(np.int64)
    return ImageSet(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels))


# ---- drawing and splitting ----------------------------------------------------------------------


def draw_balanced(dataset: ImageSet, count: int, seed: int) -> ImageSet:
    """A seeded draw of ``count`` images, as even over the classes as the data allow.

    Classes give one image each in turn until ``count`` are drawn. Raises BadData if the set is
    smaller than ``count``.
    """
    if count < 1:
        raise UsageError(f"the number of clean images must be positive, got {count}")
    if count > len(dataset):
        raise BadData(f"asked for {count} clean images, but the data hold {len(dataset)}")
    return dataset[balanced_order(dataset.labels, seed)[:count]]


def balanced_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded order int64 [N] in which the classes of labels [N] take turns."""
    order, rank, _ = _ranks(labels, seed)
    return order[torch.argsort(rank, stable=True)]


def spread_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded order int64 [N] in which every stretch holds the classes in their proportions."""
    order, rank, count = _ranks(labels, seed)
    return order[torch.argsort((rank + 0.5) / count, stable=True)]


def _ranks(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A seeded shuffle, each shuffled image's place among its class, and its class's size."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    rank, count = torch.empty_like(labels), torch.empty_like(labels)
    for label in shuffled.unique():
        of_class = (shuffled == label).nonzero().squeeze(1)
        rank[of_class] = torch.arange(len(of_class))
        count[of_class] = len(of_class)
    return order, rank, count


def check_class_names(clean: ImageSet, classes: int) -> None:
    """Folders are numbered in order, so one that is missing would shift the labels behind it."""
    if clean.class_names and len(clean.class_names) != classes:
        raise BadData(
            f"the data have {len(clean.class_names)} class folders, the network {classes} classes; "
            "name the folders by their label (0, 1, ...) if some classes are missing"
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise BadData where one of the labels int64 [N] is none of the network's classes."""
    if not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise BadData(
            f"labels must be in 0 .. {classes - 1}, the network's classes, got {low} .. {high}"
        )


def gather(
    batches: Iterable[tuple[Tensor, Tensor]],
    valid: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Collect (images, labels) batches into float32 [N, C, H, W] and int64 [N] on the CPU.

    Images may be float or uint8 (then scaled to the ``valid`` range), tensors or numpy arrays;
    single items (image [C, H, W], integer label) are taken as well.
    """
    if not isinstance(batches, Iterable):
        raise BadData(
            f"clean data must be an ImageSet or yield (images, labels) batches, got "
            f"{type(batches).__name__}"
        )
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for item in batches:
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise BadData(
                f"clean data must yield (images, labels) pairs, got {type(item).__name__}"
            )
        try:
            batch, target = torch.as_tensor(item[0]), torch.as_tensor(item[1])
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadData(
                f"clean images must be tensors or arrays, got {type(item[0]).__name__}: {error}"
            ) from error
        if batch.ndim == 3 and target.numel() == 1:
            batch, target = batch[None], target.reshape(1)
        if batch.ndim != 4 or target.shape != batch.shape[:1]:
            raise BadData(
                f"clean images must be [N, C, H, W] with labels [N], got {tuple(batch.shape)} "
                f"and {tuple(target.shape)}"
            )
        if batch.dtype == torch.uint8:
            batch = batch.float() / 255.0 * (valid[1] - valid[0]) + valid[0]
        if target.is_floating_point():
            raise BadData(f"labels must be integers, got {target.dtype}")
        images.append(batch.detach().to("cpu", torch.float32))
        labels.append(target.detach().to("cpu", torch.int64))
    if not images:
        raise BadData("the clean data are empty: no (images, labels) batch came")
    try:
        return torch.cat(images).contiguous(), torch.cat(labels)
    except RuntimeError as error:
        raise BadData(f"clean images must have one shape: {error}") from error


# ---- normalisation ------------------------------------------------------------------------------


class Normalize(nn.Module):
    """(x - mean) / std per channel, for images [N, C, H, W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise UsageError(f"--mean and --std must have one length and std > 0: {mean}, {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@dataclass(frozen=True)
class Preprocess:
    """What the network expects of pixels in [0, 1]: (x - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def module(self) -> Normalize:
        return Normalize(self.mean, self.std)


PRESETS: dict[str, Preprocess | None] = {
    "cifar10": Preprocess((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "gtsrb": None,
    "imagenet": Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": None,
}
"""Usual normalisations by data set; BackdoorBench trains GTSRB on plain pixels."""
