"""MobileNetV3 (Howard et al., arXiv 1905.02244) with torchvision's key names: the large and the
small one, and the same for images of 32 pixels, which differ in strides alone.

Its blocks' last step before the projection is a squeeze-and-excitation (Hu et al., arXiv
1709.01507): every channel times a number that the image decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from onp.errors import UnsafeOrCorruptModel

from .shapes import Shapes


@dataclass(frozen=True)
class Row:
    """One block."""

    inputs: int
    middle: int
    outputs: int
    kernel: int
    squeeze: int
    """Channels inside its squeeze-and-excitation; 0: it has none."""
    expands: bool
    """It begins with a convolution from ``inputs`` to ``middle`` channels."""
    stride: int = 1
    residual: bool = False
    swish: bool = False
    """Hardswish, not ReLU."""


@dataclass(frozen=True)
class Places:
    """What a block's place in its network decides, which no weight's shape tells."""

    strides: tuple[int, ...]
    residual: frozenset[int]
    first_swish: int

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with what their places decide."""
        return [
            replace(row, stride=stride, residual=at in self.residual, swish=at >= self.first_swish)
            for at, (row, stride) in enumerate(zip(rows, self.strides, strict=True))
        ]


_LARGE = Places(
    (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1),
    frozenset({0, 2, 4, 5, 7, 8, 9, 11, 13, 14}), 6,
)  # fmt: skip
_SMALL = Places((2, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1), frozenset({2, 4, 5, 7, 9, 10}), 3)
_SMALL_CIFAR = replace(_SMALL, strides=(1, *_SMALL.strides[1:]), residual=_SMALL.residual | {0})
_BY_BLOCKS = {len(places.strides): places for places in (_LARGE, _SMALL)}

_SMALL_WIDTHS = (
    (16, 16, 3, True), (72, 24, 3, False), (88, 24, 3, False), (96, 40, 5, True),
    (240, 40, 5, True), (240, 40, 5, True), (120, 48, 5, True), (144, 48, 5, True),
    (288, 96, 5, True), (576, 96, 5, True), (576, 96, 5, True),
)  # fmt: skip
"""(expanded width, output width, kernel, squeezed) of the paper's small network (table 2)."""


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: nn.Module | None
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01)
    return nn.Sequential(conv, norm, *([] if act is None else [act]))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class InvertedResidual(nn.Module):
    def __init__(self, row: Row) -> None:
        super().__init__()
        act = nn.Hardswish if row.swish else nn.ReLU
        layers: list[nn.Module] = []
        if row.expands:
            layers.append(_convolution(row.inputs, row.middle, 1, 1, 1, act()))
        layers.append(
            _convolution(row.middle, row.middle, row.kernel, row.stride, row.middle, act())
        )
        if row.squeeze:
            layers.append(SqueezeExcitation(row.middle, row.squeeze))
        layers.append(_convolution(row.middle, row.outputs, 1, 1, 1, None))
        self.block = nn.Sequential(*layers)
        self.residual = row.residual

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return out + x if self.residual else out


class MobileNetV3(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes]; ``hidden``: width of the classifier's middle."""

    def __init__(
        self, rows: Sequence[Row], last: int, hidden: int, classes: int, stem_stride: int = 2
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, rows[0].inputs, 3, stem_stride, 1, nn.Hardswish()),
            *(InvertedResidual(row) for row in rows),
            _convolution(rows[-1].outputs, last, 1, 1, 1, nn.Hardswish()),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(last, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def from_shapes(shapes: Shapes, of_small_images: bool = False) -> nn.Module:
    """The MobileNetV3 that weights of these shapes belong to: the large or the small one, by the
    number of its blocks, of any width."""
    stem = shapes.of("features.0.0.weight", 4)[0]
    rows: list[Row] = []
    inputs = stem
    while f"features.{len(rows) + 1}.block.0.0.weight" in shapes:
        prefix = f"features.{len(rows) + 1}.block"
        names = iter(range(4))
        at = next(names)
        expands = shapes.of(f"{prefix}.{at}.0.weight", 4)[1] > 1  # else it is depthwise
        if expands:
            at = next(names)
        middle, _, kernel, _ = shapes.of(f"{prefix}.{at}.0.weight", 4)
        at = next(names)
        squeeze = 0
        if f"{prefix}.{at}.fc1.weight" in shapes:
            squeeze = shapes.of(f"{prefix}.{at}.fc1.weight", 4)[0]
            at = next(names)
        outputs = shapes.of(f"{prefix}.{at}.0.weight", 4)[0]
        rows.append(Row(inputs, middle, outputs, kernel, squeeze, expands))
        inputs = outputs
    if len(rows) not in _BY_BLOCKS:
        raise UnsafeOrCorruptModel(
            f"not a {shapes.arch}: {len(rows)} blocks, expected {' or '.join(map(str, _BY_BLOCKS))}"
        )
    places = _BY_BLOCKS[len(rows)]
    if of_small_images:
        places = _SMALL_CIFAR if places is _SMALL else places
    last = shapes.of(f"features.{len(rows) + 1}.0.weight", 4)[0]
    hidden = shapes.of("classifier.0.weight", 2)[0]
    classes = shapes.of("classifier.3.weight", 2)[0]
    return MobileNetV3(places(rows), last, hidden, classes, 1 if of_small_images else 2)


def cifar_from_shapes(shapes: Shapes) -> nn.Module:
    """The same for images of 32 pixels: the stem, and the small one's first block, keep their size
    (of the large one, the first block does so anyway)."""
    return from_shapes(shapes, of_small_images=True)


def of_width(multiplier: float, classes: int) -> nn.Module:
    """A fresh small MobileNetV3 for images of 32 pixels (``cifar_from_shapes``), whose widths are
    the paper's times ``multiplier``. Half as wide it has 0.42 million parameters."""

    def wide(channels: float) -> int:
        return max(8, 8 * round(channels * multiplier / 8))

    rows: list[Row] = []
    inputs = wide(16)
    for at, (middle, outputs, kernel, squeezed) in enumerate(_SMALL_WIDTHS):
        squeeze = wide(middle / 4) if squeezed else 0
        rows.append(Row(inputs, wide(middle), wide(outputs), kernel, squeeze, expands=at > 0))
        inputs = wide(outputs)
    return MobileNetV3(_SMALL_CIFAR(rows), wide(576), wide(1024), classes, stem_stride=1)
