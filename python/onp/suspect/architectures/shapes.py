"""Reading an architecture's widths, depths and class count from the shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from onp.errors import UnsafeOrCorruptModel


class Shapes:
    """The shapes of a state dict, with errors that say which key does not fit."""

    def __init__(self, arch: str, state_dict: Mapping[str, Tensor]) -> None:
        self.arch = arch
        self.shapes = {key: tuple(value.shape) for key, value in state_dict.items()}

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def of(self, key: str, dims: int) -> tuple[int, ...]:
        """Shape of ``key``, which must be there, have ``dims`` dimensions and no empty one."""
        shape = self.shapes.get(key)
        if shape is None:
            some = ", ".join(sorted(self.shapes)[:4]) or "none"
            raise UnsafeOrCorruptModel(
                f"not a {self.arch}: the weights lack {key!r} (first keys: {some}); check --arch"
            )
        if len(shape) != dims or 0 in shape:
            raise UnsafeOrCorruptModel(
                f"not a {self.arch}: {key!r} must have {dims} non-empty dimensions, got {shape}"
            )
        return shape


def block_counts(shapes: Shapes, stage: str) -> list[int]:
    """Blocks per stage for keys ``<stage>.<block>.conv1.weight``; ``stage`` has a ``{}``."""
    counts: list[int] = []
    while True:
        prefix = stage.format(len(counts) + 1)
        count = 0
        while f"{prefix}.{count}.conv1.weight" in shapes:
            count += 1
        if not count:
            break
        counts.append(count)
    if not counts:
        shapes.of(f"{stage.format(1)}.0.conv1.weight", 4)  # raises, naming the missing key
    return counts
