"""MobileNetV3 (Howard et al., arXiv 1905.02244) with torchvision's key names.

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
    stride: int
    swish: bool
    """Hardswish, not ReLU."""


_LARGE_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1)
_SMALL_STRIDES = (2, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1)
_OF_SMALL_IMAGES = (1, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1)
_FIRST_SWISH = {len(_LARGE_STRIDES): 6, len(_SMALL_STRIDES): 3}
"""Blocks of the networks, and the first whose activation is hardswish."""

_SMALL = (
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
        if row.middle != row.inputs:
            layers.append(_convolution(row.inputs, row.middle, 1, 1, 1, act()))
        layers.append(
            _convolution(row.middle, row.middle, row.kernel, row.stride, row.middle, act())
        )
        if row.squeeze:
            layers.append(SqueezeExcitation(row.middle, row.squeeze))
        layers.append(_convolution(row.middle, row.outputs, 1, 1, 1, None))
        self.block = nn.Sequential(*layers)
        self.residual = row.stride == 1 and row.inputs == row.outputs

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


def from_shapes(shapes: Shapes) -> nn.Module:
    """The MobileNetV3 that weights of these shapes belong to: the large or the small one, by the
    number of its blocks, of any width."""
    stem = shapes.of("features.0.0.weight", 4)[0]
    rows: list[Row] = []
    inputs = stem
    while f"features.{len(rows) + 1}.block.0.0.weight" in shapes:
        prefix = f"features.{len(rows) + 1}.block"
        names = iter(range(4))
        at = next(names)
        if shapes.of(f"{prefix}.{at}.0.weight", 4)[1] > 1:  # not depthwise: it expands
            at = next(names)
        middle, _, kernel, _ = shapes.of(f"{prefix}.{at}.0.weight", 4)
        at = next(names)
        squeeze = 0
        if f"{prefix}.{at}.fc1.weight" in shapes:
            squeeze = shapes.of(f"{prefix}.{at}.fc1.weight", 4)[0]
            at = next(names)
        outputs = shapes.of(f"{prefix}.{at}.0.weight", 4)[0]
        rows.append(Row(inputs, middle, outputs, kernel, squeeze, 1, False))
        inputs = outputs
    known = {len(strides): strides for strides in (_LARGE_STRIDES, _SMALL_STRIDES)}
    if len(rows) not in known:
        raise UnsafeOrCorruptModel(
            f"not a {shapes.arch}: {len(rows)} blocks, expected {' or '.join(map(str, known))}"
        )
    last = shapes.of(f"features.{len(rows) + 1}.0.weight", 4)[0]
    hidden = shapes.of("classifier.0.weight", 2)[0]
    classes = shapes.of("classifier.3.weight", 2)[0]
    return MobileNetV3(_placed(rows, known[len(rows)]), last, hidden, classes)


def of_width(multiplier: float, classes: int) -> nn.Module:
    """A fresh small MobileNetV3 for images of 32 pixels (its stem and first block keep their
    size), whose widths are the paper's times ``multiplier``. Half as wide it has 0.42 million
    parameters."""

    def wide(channels: float) -> int:
        return max(8, 8 * round(channels * multiplier / 8))

    rows: list[Row] = []
    inputs = wide(16)
    for middle, outputs, kernel, squeezed in _SMALL:
        squeeze = wide(middle / 4) if squeezed else 0
        rows.append(Row(inputs, wide(middle), wide(outputs), kernel, squeeze, 1, False))
        inputs = wide(outputs)
    return MobileNetV3(
        _placed(rows, _OF_SMALL_IMAGES), wide(576), wide(1024), classes, stem_stride=1
    )


def _placed(rows: Sequence[Row], strides: Sequence[int]) -> list[Row]:
    """The rows with what their place decides."""
    return [
        replace(row, stride=stride, swish=at >= _FIRST_SWISH[len(rows)])
        for at, (row, stride) in enumerate(zip(rows, strides, strict=True))
    ]
