"""Train the zoo: ``python -m bench.zoo --set core --data ../shared/data``.

Resumable: a model whose card is there is not trained again. Cards are printed as JSON lines,
progress goes to stderr. Exit code 1 if a model is unfair or failed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.zoo import checkpoints, datasets
from bench.zoo.attacks import Knowledge, poison
from bench.zoo.checkpoints import ZooModel, make_attack, read_card, with_normalisation
from bench.zoo.jobs import train_side_by_side
from bench.zoo.recipes import SETS, Recipe, recipes
from bench.zoo.scoring import Exam, unfair
from bench.zoo.training import train
from bench.zoo.trigger_fingerprint import trigger_fingerprint
from onp.data import ImageSet
from onp.errors import OnpError


class Splits:
    """Train and test images of the data sets, read once."""

    def __init__(self, data: Path | None) -> None:
        self.data = data
        self.read: dict[tuple[str, str], ImageSet] = {}

    def __call__(self, dataset: str, split: str) -> ImageSet:
        key = (dataset, split)
        if key not in self.read:
            self.read[key] = datasets.load(dataset, self.data, split)
        return self.read[key]


def make(recipe: Recipe, splits: Splits, folder: Path, device: torch.device) -> dict[str, Any]:
    """Train one network, write it to ``folder``, score the file and return its card."""
    train_set, test_set = splits(recipe.dataset, "train"), splits(recipe.dataset, "test")
    images, labels = train_set.images, train_set.labels
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"{recipe.name}: {line}", file=sys.stderr, flush=True)

    attack, twin = make_attack(recipe), None
    if attack is not None:
        twin_card = read_card(folder, recipe.twin)
        if twin_card is None or not twin_card["fair"]:
            raise OnpError(f"{recipe.name} needs its clean twin {recipe.twin.name} first")
        twin = ZooModel(recipe.twin, twin_card, folder)
        attack.prepare(Knowledge(images, labels, twin.model.to(device), log))
        if not attack.online:
            images, labels = poison(attack, images, labels, ratio=recipe.ratio, seed=recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = recipe.network()
    if recipe.retrained and twin is not None:
        network.load_state_dict(twin.weights())
    whole = with_normalisation(network, recipe.dataset).to(device)
    train(whole, images, labels, recipe.training, seed=recipe.seed, attack=attack,
          ratio=recipe.ratio, log=log)  # fmt: skip
    seconds = time.perf_counter() - started

    network = network.cpu().half().float()  # scored as it is stored
    whole = with_normalisation(copy.deepcopy(network), recipe.dataset).eval().to(device)
    exam = Exam.of(test_set, attack)
    scores = exam.score(whole)
    twin_asr = None if twin is None else exam.attack_success(twin.model)
    reason = unfair(recipe.dataset, attack, scores, twin.card["ca"] if twin else None)
    card = {
        "name": recipe.name,
        "dataset": recipe.dataset,
        "arch": recipe.arch,
        "width": recipe.width,
        "attack": recipe.attack,
        "ratio": recipe.ratio if attack else 0.0,
        "target": recipe.target if attack else None,
        "seed": recipe.seed,
        "retrained": recipe.retrained,
        "options": dict(recipe.options),
        "classes": datasets.CLASS_COUNTS[recipe.dataset],
        "parameters": sum(p.numel() for p in network.parameters()),
        "twin": recipe.twin.name if attack else None,
        "ca": _rounded(scores.ca),
        "asr": _rounded(scores.asr),
        "ra": _rounded(scores.ra),
        "trigger_fingerprint": trigger_fingerprint(attack) if attack else None,
        "triggered_images": 0 if exam.triggered is None else len(exam.triggered),
        "asr_clean_twin": _rounded(twin_asr),
        "fair": reason is None,
        "why_not_fair": reason,
        "training": asdict(recipe.training),
        "train_images": len(train_set),
        "test_images": len(test_set),
        "test_data": datasets.fingerprint(test_set),
        "train_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "torch": torch.__version__,
    }
    checkpoints.save(folder, recipe, network, attack, card)
    return card


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__)
    parser.add_argument("--set", default="smoke", choices=sorted(SETS), help="which networks")
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--out", type=Path, default=Path("bench/zoo/models"),
                        help="folder for weights, triggers and cards")  # fmt: skip
    parser.add_argument("--models", nargs="+", metavar="TEXT",
                        help="only recipes whose name contains one of these")  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1,
                        help="trainings side by side, each with its part of the cores")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the recipes and stop")
    args = parser.parse_args()
    wanted = [
        recipe
        for recipe in recipes(args.set)
        if not args.models or any(part in recipe.name for part in args.models)
    ]
    if not wanted:
        parser.error(f"no recipe of {args.set} is called like {', '.join(args.models)}")
    if args.list:
        print("\n".join(recipe.name for recipe in wanted))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1:
        options = ["--set", args.set, "--out", str(args.out), "--device", args.device]
        options += ["--data", str(args.data)] if args.data else []
        return 1 if train_side_by_side(wanted, options, args.jobs) else 0
    splits, wrong, started = Splits(args.data), 0, time.perf_counter()
    for number, recipe in enumerate(wanted, start=1):
        head = f"[{number}/{len(wanted)}] {recipe.name}"
        card = read_card(args.out, recipe)
        if card is not None:
            print(f"{head}: done before", file=sys.stderr)
        else:
            print(f"{head} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
            try:
                card = make(recipe, splits, args.out, torch.device(args.device))
            except OnpError as error:
                print(f"{head}: {error}", file=sys.stderr)
                wrong += 1
                continue
            print(json.dumps(card), flush=True)
        if not card["fair"]:
            print(f"{head}: left out, {card['why_not_fair']}", file=sys.stderr)
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
