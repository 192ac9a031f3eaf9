"""Convolutions on a GPU, one by one: with bias, activation and gates in one kernel, and the same
behind what cuDNN gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.gate import timed
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row

IMAGES, MASKS = 4096, 8
ALONE = "cuDNN alone"
SHAPES = {
    "64 to 64, 32x32": (64, 64, 32, 1, 3),
    "64 to 128, 16x16, stride 2": (64, 128, 16, 2, 3),
    "128 to 128, 16x16": (128, 128, 16, 1, 3),
    "256 to 256, 8x8": (256, 256, 8, 1, 3),
    "512 to 512, 4x4": (512, 512, 4, 1, 3),
    "64 to 128, 16x16, stride 2, 1x1": (64, 128, 16, 2, 1),
}
"""Those of PreActResNet-18 of width 64: channels in and out, side of the output, stride, kernel."""
PRECISIONS = {"reduced": (torch.bfloat16, 1e-2), "tf32": (torch.float32, 2e-3)}
"""Types, and errors that are allowed for, of the largest value."""


@dataclass(frozen=True)
class Case:
    """A convolution on random maps."""

    maps: Tensor
    """[I, H, W, C]"""
    weight: Tensor
    """[O, C, k, k]"""
    bias: Tensor
    gates: Tensor
    """[MASKS, O + ...]"""
    stride: int
    side: int
    """Of the output."""

    @classmethod
    def drawn(
        cls, channels: int, outputs: int, side: int, stride: int, kernel: int, dtype: torch.dtype
    ) -> Case:
        random = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=random)

        weight = normal(outputs, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
        weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(
            normal(IMAGES, side * stride, side * stride, channels).to(dtype), weight.to(dtype),
            normal(outputs), (normal(MASKS, outputs + 16) > -1).float(), stride, side,
        )  # fmt: skip

    @property
    def gflop(self) -> float:
        return 2 * IMAGES * self.side**2 * self.weight.numel() / 1e9

    def cudnn(self) -> Tensor:
        """The convolution alone, [I, H, W, O]."""
        pad = self.weight.shape[2] // 2
        out = F.conv2d(self.maps.permute(0, 3, 1, 2), self.weight, None, self.stride, pad)
        return out.permute(0, 2, 3, 1)

    def expected(self) -> Tensor:
        """With bias, ReLU and gates."""
        gates = self.gates[:, : len(self.bias)].repeat_interleave(IMAGES // MASKS, 0)
        return F.relu(self.cudnn().float() + self.bias) * gates[:, None, None]

    def ways(self) -> dict[str, Callable[[], list[Tensor]]]:
        from onp.ops import masked_forward_triton as kernels

        final = self.maps.new_empty(IMAGES, self.side, self.side, len(self.bias))
        epilogue = kernels.Epilogue(
            self.bias, None, 1, None, None, None, 0, self.gates, 0, IMAGES // MASKS, final
        )
        prepared: Any = kernels.prepare(
            self.weight, self.stride, self.side, self.side, self.maps.dtype
        )

        def fused() -> list[Tensor]:
            kernels.launch_conv(self.maps, prepared, epilogue)
            return [final]

        def behind() -> list[Tensor]:
            kernels.launch_epilogue(self.cudnn(), epilogue)
            return [final]

        return {"onp": fused, "cuDNN, then our epilogue": behind, ALONE: lambda: [self.cudnn()]}


def rows(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """Every shape in both precisions; cuDNN alone does less and is not compared."""
    for name, shape in list(SHAPES.items())[: 1 if quick else None]:
        for precision, (dtype, tolerance) in PRECISIONS.items():
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
                case = Case.drawn(*shape, dtype)
                expected = {ALONE: case.cudnn()}
                for way, run in case.ways().items():
                    row = Row("convolution", name, way, precision, None, False)
                    if way == ALONE:
                        row = replace(row, forced=True, note="does less: not compared")
                    wanted = [expected.get(way, case.expected())]
                    row = timed(row, run, wanted, 10 * repeats, tolerance)
                    peak = ceilings.gflops(precision)
                    if row.seconds is not None and peak is not None:
                        row = replace(row, share_of_peak=round(case.gflop / row.seconds / peak, 3))
                    yield row
