"""A checkpoint in, a repaired one and its report out: one file, for one command or for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onp import __version__
from onp.config import Config
from onp.data import ImageSet, Preprocess
from onp.ledger import Progress
from onp.report.profile import Stopwatch
from onp.sanitize import sanitize
from onp.suspect.files import read_weights, save_weights
from onp.suspect.load import Suspect


@dataclass(frozen=True)
class RepairOptions:
    """How a checkpoint is to be repaired: the arguments of ``onp.sanitize``, and ``compact``."""

    budget: str | Config = "standard"
    seed: int = 0
    preprocess: Preprocess | None = None
    device: str = "cpu"
    threads: int | None = None
    recalibrate: bool = False
    finetune: bool = False
    compact: bool = False
    """Write the smaller network of ``Result.compact``."""
    target: int | None = None


def repair_checkpoint(
    suspect: Suspect,
    clean: ImageSet,
    out: Path,
    options: RepairOptions,
    *,
    progress: Progress | None = None,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Repair the suspect and write its weights to ``out``, atomically.

    ``clean``: images uint8 [N, H, W, 3] with labels int64 [N]. Returns the report, with ``arch``
    and the paths and sha256 of the ``suspect`` and the ``repaired`` file; ``watch`` gets the steps
    ``repair`` and ``write``. Raises an ``OnpError`` where the network or the images cannot be used
    or ``out`` cannot be written.
    """
    watch = watch or Stopwatch()
    with watch.step("repair"):
        result = sanitize(
            suspect.model,
            clean,
            seed=options.seed,
            budget=options.budget,
            target=options.target,
            device=options.device,
            preprocess=options.preprocess,
            threads=options.threads,
            recalibrate=options.recalibrate,
            finetune=options.finetune,
            progress=progress,
        )
    with watch.step("write"):
        repaired = result.compact() if options.compact else result.model
        sha256 = suspect.file.sha256
        metadata = {"onp": __version__, "arch": suspect.arch, "suspect_sha256": sha256}
        save_weights(out, repaired.state_dict(), metadata)
        written = read_weights(out).sha256
    return result.report | {
        "arch": suspect.arch,
        "suspect": {
            "path": str(suspect.file.path),
            "sha256": sha256,
            "loader": suspect.file.loader,
        },
        "repaired": {"path": str(out), "sha256": written, "compact": options.compact},
    }
