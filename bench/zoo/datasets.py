"""The images that the zoo is trained and measured on, by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from onp.data import PRESETS, ImageSet, Preprocess, load_dataset
from onp.demo.images import CLASSES, draw
from onp.errors import UsageError

FIRST_CLASSES = {"cifar2": ("cifar10", 2), "cifar3": ("cifar10", 3), "gtsrb5": ("gtsrb", 5)}
"""Data sets that are the first classes of another."""

CLASS_COUNTS = {"cifar10": 10, "gtsrb": 43, "shapes": len(CLASSES)} | {
    name: count for name, (_, count) in FIRST_CLASSES.items()
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
    if name in FIRST_CLASSES:
        whole, classes = FIRST_CLASSES[name]
        return _of_first(load(whole, data, split), classes)
    if data is None:
        raise UsageError(f"{name} is not generated: pass --data, the folder with {name}.zip")
    return load_dataset(Path(data) / f"{name}.zip", split)


def _of_first(images: ImageSet, classes: int) -> ImageSet:
    own = images.labels < classes
    names = images.class_names[:classes]
    return replace(images, images=images.images[own], labels=images.labels[own], class_names=names)


def normalisation(name: str) -> Preprocess | None:
    """What the zoo's networks of this data set have in front, inside the model."""
    return PRESETS.get(FIRST_CLASSES.get(name, (name, 0))[0])


def fingerprint(images: ImageSet) -> str:
    """Twelve hex digits over pixels and labels: cards name the data they were scored on."""
    digest = hashlib.sha256(images.images.numpy().tobytes())
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()[:12]
