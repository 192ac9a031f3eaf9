"""``python -m bench.recordings``: the masks that real repairs evaluate, for the table of kernels.

Repairs three networks of the core set (standard budget, seed 0) and writes every evaluation, masks
and number of images, in the order in which they came, to bench/recordings; sha256 in index.json.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.scoreboard.provenance import provenance
from bench.zoo.checkpoints import load_set
from bench.zoo.datasets import load
from onp import masks
from onp.data import draw_balanced
from onp.evaluate import MaskEvaluator
from onp.files import write_json
from onp.sanitize import sanitize

_BENCH = Path(__file__).parent
FOLDER = _BENCH / "recordings"
NETWORKS = (
    "cifar10_preactresnet18-16_wanet_10pct_to9_strength1_s0",
    "gtsrb_resnet20-16_badnets_10pct_to5_side5_s0",
    "gtsrb_mobilenetv2-0.25_trojannn_10pct_to25_s0",
)
SEED, CLEAN_SAMPLES = 0, 500


@dataclass(frozen=True)
class Recording:
    """The evaluations of one repair."""

    name: str
    sites: int
    calls: list[tuple[Tensor, int]]
    """Masks bool [B, S], and images."""

    @property
    def image_forwards(self) -> int:
        return sum(len(pruned) * count for pruned, count in self.calls)

    def write(self, folder: Path) -> str:
        """The file's sha256."""
        packed = torch.cat([masks.pack(pruned) for pruned, _ in self.calls])
        path = folder / f"{self.name}.npz"
        np.savez_compressed(
            path,
            masks=packed.numpy(),
            batches=np.array([len(pruned) for pruned, _ in self.calls]),
            images=np.array([count for _, count in self.calls]),
            sites=np.array(self.sites),
        )
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @classmethod
    def read(cls, name: str, folder: Path = FOLDER) -> Recording:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
            sites = int(stored["sites"])
            pruned = masks.unpack(torch.from_numpy(stored["masks"]), sites)
            parts = pruned.split(stored["batches"].tolist())
            return cls(name, sites, list(zip(parts, stored["images"].tolist(), strict=True)))


@contextmanager
def recorded() -> Iterator[list[tuple[Tensor, int]]]:
    """The evaluations of every evaluator, as they come."""
    calls: list[tuple[Tensor, int]] = []
    run = MaskEvaluator.run

    def record(self: MaskEvaluator, pruned: Tensor, images: Tensor, **options: Any) -> Tensor:
        calls.append((pruned.clone(), len(images)))
        return run(self, pruned, images, **options)

    MaskEvaluator.run = record  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        MaskEvaluator.run = run  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.recordings", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10.zip, gtsrb.zip"
    )
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    index: dict[str, Any] = {"seed": SEED, "clean_samples": CLEAN_SAMPLES, **provenance()}
    for network in load_set("core", _BENCH / "zoo" / "models"):
        if network.name not in NETWORKS:
            continue
        clean = draw_balanced(load(network.recipe.dataset, args.data, "train"), CLEAN_SAMPLES, SEED)
        with recorded() as calls:
            result = sanitize(network.model, clean, seed=SEED)
        recording = Recording(network.name, len(result.mask), calls)
        index[network.name] = {
            "sha256": recording.write(FOLDER),
            "evaluations": len(calls),
            "masks": sum(len(pruned) for pruned, _ in calls),
            "image_forwards": recording.image_forwards,
        }
        print(network.name, index[network.name], file=sys.stderr, flush=True)
    write_json(FOLDER / "index.json", index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
