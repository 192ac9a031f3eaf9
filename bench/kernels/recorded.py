"""Masked forward on what real repairs evaluated (``bench.recordings``): ours with shared prefixes,
evaluation by evaluation, against ways that run one mask after the other. Images are random: no
way's time depends on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.gated import gated
from bench.kernels.masked_forward import (
    BYTES,
    LAST,
    ROUGH,
    TOLERANCES,
    Case,
    Way,
    eager,
    openvino,
)
from bench.kernels.peak import Ceilings, best_time
from bench.kernels.rows import Row
from bench.recordings import NETWORKS, Recording
from bench.zoo.checkpoints import load_set
from onp import masks
from onp.ops.masked_forward import lower
from onp.suspect.trace import trace

KERNEL = "recorded evaluations"
TARGET = 4.0
"""Of OpenVINO in bf16; ten times eager torch."""
ENOUGH = 1024
"""Image-forwards that a way is timed on which shares nothing between masks."""
MODELS = Path(__file__).parents[1] / "zoo" / "models"
WAYS = (
    Way("torch eager, channels last", "fp32", eager(LAST)),
    Way("OpenVINO", "fp32", openvino("f32")),
    Way("OpenVINO, bf16", "reduced", openvino("bf16")),
)


@dataclass(frozen=True)
class Repair:
    """A recording with its network."""

    recording: Recording
    case: Case
    """Without masks; images as many as the largest evaluation has."""

    @classmethod
    def of(cls, name: str) -> Repair:
        recording = Recording.read(name)
        network = next(one for one in load_set("core", MODELS) if one.name == name)
        traced = trace(network.model, (3, 32, 32))
        assert traced.sites == recording.sites, "the network changed: record again"
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.model(torch.rand(1, 3, 32, 32))
        torch.manual_seed(0)
        images = torch.rand(max(count for _, count in recording.calls), 3, 32, 32)
        case = Case(
            name, network.model, traced, gated(network.model, traced), images,
            torch.zeros(0, traced.sites, dtype=torch.bool),
            counter.get_total_flops() * recording.image_forwards / 1e9, {},
        )  # fmt: skip
        return cls(recording, case)

    def by_count(self) -> Iterator[Case]:
        """The masks that are asked for on each number of images."""
        for count in sorted({count for _, count in self.recording.calls}):
            pruned = torch.cat([one for one, own in self.recording.calls if own == count])
            yield replace(self.case, images=self.case.images[:count], pruned=pruned)

    def row(self, way: str, precision: str) -> Row:
        return Row(KERNEL, self.case.name, way, precision, None, False)

    def ours(self, ceilings: Ceilings, repeats: int, name: str, *, share: bool) -> Row:
        """Every evaluation as the repair asked for it; ``name``: onp, or one of ``ROUGH``."""
        largest = max(self.by_count(), key=lambda case: len(case.pruned))
        exact = name not in ROUGH
        plan = lower(self.case.trace, self.case.model) if exact else ROUGH[name](largest)
        precision = "fp32" if exact else "reduced"
        calls = [
            (masks.pack(pruned), self.case.images[:count]) for pruned, count in self.recording.calls
        ]

        def run() -> None:
            for packed, images in calls:
                plan.run(packed, images, share=share)

        row = self.row(name if share else f"{name}, nothing shared", precision)
        for case in self.by_count():
            few = case.images[: case.expected.shape[1]]
            off = wrong_by(case, plan.run(masks.pack(case.pruned[:2]), few, share=share))
            if not off < TOLERANCES[precision]:
                return replace(row, note=f"off by {off:.2g} of the largest logit")
        seconds = best_time(run, repeats)
        peak = ceilings.int8_gops if name == BYTES else ceilings.gflops(precision)
        share_of_peak = None if peak is None else round(self.case.gflop / seconds / peak, 3)
        return replace(
            row, seconds=seconds, correct=True, share_of_peak=share_of_peak, forced=not share,
            target=TARGET if share else None,
        )  # fmt: skip

    def other(self, way: Way, repeats: int) -> Row:
        """The sum over the numbers of images."""
        row, seconds = self.row(way.name, way.precision), 0.0
        for case in self.by_count():
            try:
                run = way.make(case)
                off = wrong_by(case, run(case.pruned[:2])[:, : case.expected.shape[1]])
            except Exception as error:
                return replace(row, note=f"did not run: {type(error).__name__}: {error}"[:200])
            if not off < TOLERANCES[way.precision]:
                return replace(row, note=f"off by {off:.2g} of the largest logit")
            some = case.pruned[: max(ENOUGH // len(case.images), 1)]
            taken = best_time(lambda run=run, some=some: run(some), repeats)
            seconds += taken * len(case.pruned) / len(some)
        note = f"timed on {ENOUGH} image-forwards of each number of images"
        return replace(row, seconds=seconds, correct=True, note=note)


def wrong_by(case: Case, found: torch.Tensor) -> float:
    """Of the largest logit expected."""
    return float((found - case.expected).abs().max()) / float(case.expected.abs().max())


def rows(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:
    """Every recording; if quick the first."""
    for name in NETWORKS[: 1 if quick else None]:
        repair = Repair.of(name)
        for ours in ("onp", *ROUGH):
            for share in (True, False):
                print(f"{name}: {ours}, {share=}", file=sys.stderr, flush=True)
                yield repair.ours(ceilings, repeats, ours, share=share)
        for way in WAYS:
            print(f"{name}: {way.name}", file=sys.stderr, flush=True)
            yield repair.other(way, repeats)
