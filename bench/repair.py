"""``python -m bench.repair``: repair checkpoints from clean images and score with the true trigger.

One JSON line per (model, seed), appended when it is done; a line that is there is not run again.
Each ``--model`` is ``weights[:trigger.npz]``; without a trigger the network is taken as clean.
Selection uses clean training images alone; the trigger and the test images only score.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.files import append_row, read_rows
from onp import __version__
from onp.data import PRESETS, ImageSet, draw_balanced, load_dataset
from onp.metrics import score
from onp.report.progress import progress_on_stderr
from onp.sanitize import sanitize
from onp.suspect.load import load_suspect
from onp.triggers import load_trigger


def repair(
    spec: str, train_set: ImageSet, test_set: ImageSet, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: scores before and after on the test images, verdict, cost."""
    path, _, trigger_path = spec.partition(":")
    suspect = load_suspect(path, args.arch)
    preprocess = PRESETS[args.preset]
    trigger = load_trigger(trigger_path) if trigger_path else None
    target = args.target if trigger_path else None
    before = score(suspect.model, test_set, trigger, target, preprocess)
    clean = draw_balanced(train_set, args.clean_samples, seed)
    started = time.perf_counter()
    with progress_on_stderr(args.quiet) as progress:
        result = sanitize(
            suspect.model, clean, seed=seed, budget=args.budget, preprocess=preprocess,
            progress=progress,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    after = score(result.model, test_set, trigger, target, preprocess)
    names = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
    report = result.report
    return {
        "model": Path(path).name,
        "seed": seed,
        "budget": args.budget,
        "clean_samples": args.clean_samples,
        "before": {name: round(before[name], 4) for name in names if name in before},
        "after": {name: round(after[name], 4) for name in names if name in after},
        "test_images": after["images"],
        "triggered_images": after.get("triggered_images"),
        "verdict": result.verdict,
        "score": report["score"],
        "evidence": report["evidence"],
        "target_classes": report["target_classes"],
        "pruned": report["sites"]["pruned"],
        "sites": report["sites"]["total"],
        "seconds": round(seconds, 1),
        "image_forwards": report["image_forwards"]["total"],
        "backend": report["backend"],
        "threads": torch.get_num_threads(),
        "onp": __version__,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="weights[:trigger.npz]")
    parser.add_argument("--arch", default="preactresnet18")
    parser.add_argument("--data", required=True, help="folder or zip with train/ and test/")
    parser.add_argument("--preset", default="cifar10", choices=sorted(PRESETS))
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("bench/results/repair.jsonl"))
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    train_set, test_set = load_dataset(args.data, "train"), load_dataset(args.data, "test")
    rows = read_rows(args.out)
    done = {(row["model"], row["seed"], row["budget"], row["clean_samples"]) for row in rows}
    for spec in args.model:
        for seed in args.seeds:
            name = Path(spec.partition(":")[0]).name
            if (name, seed, args.budget, args.clean_samples) in done:
                print(f"{name}, seed {seed}: done before", file=sys.stderr)
                continue
            row = repair(spec, train_set, test_set, seed, args)
            append_row(args.out, row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
