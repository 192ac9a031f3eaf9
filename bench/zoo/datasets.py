"""The images that the zoo is trained and measured on, by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from onp.data import PRESETS, ImageSet, Preprocess, load_dataset
from onp.demo.images import CLASSES, draw
from onp.errors import UsageError

_CHOSEN = {
    "cifar10": (
        (3, 5), (8, 9), (1, 6, 7), (2, 4, 7), (6, 7, 8), (0, 3, 5, 8),
        (4, 9), (2, 5, 6), (1, 4, 7, 9), (0, 5, 9), (1, 3, 4, 6, 8),
    ),
    "gtsrb": (
        (2, 13), (1, 2, 5), (12, 13, 38), (10, 11, 25, 38), (3, 9, 14, 18, 33),
        (4, 20, 35), (6, 8, 14, 28, 37), (3, 28, 36), (0, 1, 14, 20),
    ),
}  # fmt: skip
SUBSETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "cifar2": ("cifar10", (0, 1)),
    "cifar3": ("cifar10", (0, 1, 2)),
    "gtsrb5": ("gtsrb", (0, 1, 2, 3, 4)),
    **{
        "-".join([whole, *map(str, classes)]): (whole, classes)
        for whole, choices in _CHOSEN.items()
        for classes in choices
    },
}
"""Data sets that are some classes of another, relabelled in their order: its name and theirs."""

CLASS_COUNTS = {"cifar10": 10, "gtsrb": 43, "shapes": len(CLASSES)} | {
    name: len(classes) for name, (_, classes) in SUBSETS.items()
}
"""Data sets and their class counts; ``shapes`` are generated, the others come from ``--data``."""

SHAPES = {"train": (10_000, 3_000_017), "test": (1_000, 2_000_003)}
"""(images, seed) of the generated splits."""


def load(name: str, data: str | Path | None, split: str) -> ImageSet:
    """The ``train`` or ``test`` split; ``data`` is the folder that holds ``<name>.zip``.

    Raises UsageError where the name is unknown or the folder is needed and not given.
    """
    if name not in CLASS_COUNTS:
        raise UsageError(f"unknown data set {name!r}; known are {', '.join(CLASS_COUNTS)}")
    if name == "shapes":
        return draw(*SHAPES[split])
    if name in SUBSETS:
        whole, classes = SUBSETS[name]
        return _of(load(whole, data, split), classes, CLASS_COUNTS[whole])
    if data is None:
        raise UsageError(f"{name} is not generated: pass --data, the folder with {name}.zip")
    return load_dataset(Path(data) / f"{name}.zip", split)


def _of(images: ImageSet, classes: tuple[int, ...], count: int) -> ImageSet:
    places = torch.full((count,), -1)
    places[list(classes)] = torch.arange(len(classes))
    labels = places[images.labels]
    own = labels >= 0
    names = tuple(images.class_names[one] for one in classes if images.class_names)
    return replace(images, images=images.images[own], labels=labels[own], class_names=names)


def normalisation(name: str) -> Preprocess | None:
    """What the zoo's networks of this data set have in front, inside the model."""
    return PRESETS.get(SUBSETS[name][0] if name in SUBSETS else name)


def fingerprint(images: ImageSet) -> str:
    """Twelve hex digits over pixels and labels: cards name the data they were scored on."""
    digest = hashlib.sha256(images.images.numpy().tobytes())
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()[:12]
