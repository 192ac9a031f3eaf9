"""``python -m bench.end_to_end``: whole repairs on one device, timed and scored.

Every backdoored network of a set is repaired at each budget, several times in one process;
``seconds`` are those of the fastest run but the first. The very first run of a process includes
what is set up once (kernels compiled, libraries loaded). Then ten networks one after the other, as
they come from their files. One JSON line per (network, budget), appended when it is done; lines
that are there, of the same weights and commit, are not made again. The true trigger and the test
images only score.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.files import append_row, read_rows
from bench.scoreboard.provenance import provenance
from bench.scoreboard.rows import der
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.datasets import load
from bench.zoo.scoring import Exam
from onp.data import ImageSet, draw_balanced
from onp.result import Result
from onp.sanitize import sanitize

_BENCH = Path(__file__).parent
TEN = 10
TEST_SEED = 0
Row = dict[str, Any]


def repaired(
    model: nn.Module, clean: ImageSet, budget: str, args: argparse.Namespace
) -> tuple[Result, float]:
    """The result and the seconds it took."""
    started = time.perf_counter()
    result = sanitize(model, clean, seed=args.seed, budget=budget)
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def measured(network: ZooModel, clean: ImageSet, exam: Exam, args: argparse.Namespace) -> list[Row]:
    """A row for each budget."""
    model = copy.deepcopy(network.model).to(args.device)
    before = exam.score(model)
    assert before.asr is not None
    rows = []
    for budget in args.budgets:
        runs = [repaired(model, clean, budget, args) for _ in range(args.repeats)]
        result, seconds = runs[0][0], [run[1] for run in runs]
        later = range(1, args.repeats) if args.repeats > 1 else range(1)
        fastest = min(later, key=lambda number: seconds[number])
        after = exam.score(result.model)
        assert after.asr is not None
        rows.append(
            {
                "model": network.name,
                "weights": network.digest,
                "budget": budget,
                "seed": args.seed,
                "clean_samples": len(clean),
                "test_images": len(exam.clean),
                "seconds_first": round(seconds[0], 3),
                "seconds": round(seconds[fastest], 3),
                "repeats": args.repeats,
                "stages": runs[fastest][0].report["seconds"],
                "image_forwards": result.report["image_forwards"]["total"],
                "verdict": result.verdict,
                "target_classes": result.report["target_classes"],
                "pruned": result.report["sites"]["pruned"],
                "ca_before": before.ca,
                "ca_after": after.ca,
                "asr_before": before.asr,
                "asr_after": after.asr,
                "ra_after": after.ra,
                "asr_clean_twin": network.card["asr_clean_twin"],
                "der": der(before.asr, after.asr, before.ca, after.ca),
                "same_masks": all(bool((r.mask == result.mask).all()) for r, _ in runs),
                **facts(args),
            }
        )
    return rows


def facts(args: argparse.Namespace) -> Row:
    """What a row was measured with."""
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu"
    return {"device": name, **provenance()}


def ten(networks: list[ZooModel], sets: dict[str, ImageSet], args: argparse.Namespace) -> Row:
    """Ten repairs in one process, models read and moved to the device in the time."""
    budget = args.budgets[0]
    chosen = list(itertools.islice(itertools.cycle(networks), TEN))
    started = time.perf_counter()
    for network in chosen:
        model = ZooModel(network.recipe, network.card, network.folder).model.to(args.device)
        repaired(model, sets[network.recipe.dataset], budget, args)
    seconds = round(time.perf_counter() - started, 2)
    names = sorted({network.name for network in networks})
    return {"ten_models": names, "budget": budget, "seconds": seconds, **facts(args)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__)
    parser.add_argument("--set", default="core")
    parser.add_argument("--models", nargs="+", metavar="TEXT",
                        help="only networks whose name contains one of these")  # fmt: skip
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--budgets", nargs="+", default=["standard", "quick"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    networks = [
        network
        for network in load_set(args.set, args.models_dir)
        if network.recipe.attack != "clean"
        and network.card["fair"]
        and (not args.models or any(part in network.name for part in args.models))
    ]
    if not networks:
        parser.error(f"no backdoored network of {args.set} in {args.models_dir}")
    kept = read_rows(args.out)
    done = {(row.get("model"), row.get("weights"), row["commit"]) for row in kept}
    commit = provenance()["commit"]

    def write(row: Row) -> None:
        append_row(args.out, row)
        print(json.dumps(row), flush=True)

    sets: dict[str, ImageSet] = {}
    for network in networks:
        dataset = network.recipe.dataset
        if dataset not in sets:
            images = load(dataset, args.data, "train")
            sets[dataset] = draw_balanced(images, args.clean_samples, args.seed)
        if (network.name, network.digest, commit) in done:
            print(f"{network.name}: done before", file=sys.stderr)
            continue
        test = load(dataset, args.data, "test")
        test = draw_balanced(test, min(args.test_images, len(test)), TEST_SEED)
        for row in measured(network, sets[dataset], Exam.of(test, network.attack), args):
            write(row)
    write(ten(networks, sets, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
