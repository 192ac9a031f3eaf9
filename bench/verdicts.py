"""``python -m bench.verdicts``: does the verdict tell backdoored networks from clean ones?

One JSON line per (network, seed, budget, norms or not), appended when it is done; lines that are
there are not made again. A row holds the score that ``onp.sanitize`` would call a backdoor by and
the class it would name; no search is run. Then a summary: the area under the ROC curve with a
bootstrap interval over networks, calls, and the classes named.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.ablations.setting import investigate
from bench.files import append_row, read_rows
from bench.scoreboard.provenance import provenance
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.datasets import load
from onp.config import BUDGETS
from onp.data import ImageSet, draw_balanced

RESAMPLES = 2000
_BENCH = Path(__file__).parent


def row_of(
    network: ZooModel, clean: ImageSet, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The verdict on one network, and what would have been right."""
    recipe = network.recipe
    config = BUDGETS[args.budget]
    if args.without_norms:
        config = replace(config, replay=replace(config.replay, least_excess=math.inf))
    verdict = investigate(network.model.eval(), clean, config, seed).evidence.verdict
    named = verdict.target
    all_to_one = recipe.attack not in ("clean", "badnets-all")
    return {
        "model": network.name,
        "seed": seed,
        "budget": args.budget,
        "norms": not args.without_norms,
        "clean_samples": len(clean),
        "backdoored": recipe.attack != "clean",
        "target": str(recipe.target) if all_to_one else None,
        "finding": verdict.finding,
        "score": round(verdict.score, 5),
        "by": verdict.by,
        "named": None if named is None else str(getattr(named, "target", named)),
        "also": list(verdict.also),
    } | provenance()


def auroc(backdoored: torch.Tensor, clean: torch.Tensor) -> float:
    """Chance that a backdoored network's score [n] is above a clean one's [m]; ties count half."""
    lead = backdoored[:, None] - clean[None]
    return float((lead.sign() + 1).mean() / 2)


def summary(rows: list[dict[str, Any]]) -> str:
    """Per seed and for the mean score over seeds of every network."""
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| seed | backdoored called | clean called | class named | AUROC (95%) |"]
    lines.append("|---|---|---|---|---|")
    for seed in seeds:
        own = [row for row in rows if row["seed"] == seed]
        parts = [
            torch.tensor([row["score"] for row in own if row["backdoored"] == which])
            for which in (True, False)
        ]
        called = [
            sum(row["finding"] == "backdoor" for row in own if row["backdoored"] == which)
            for which in (True, False)
        ]
        aimed = [row for row in own if row["target"] is not None]
        right = sum(
            row["target"] in (row["named"], *map(str, row.get("also", []))) for row in aimed
        )
        area = "–"
        if all(len(part) for part in parts):
            low, high = _interval(*parts)
            area = f"{auroc(*parts):.3f} ({low:.3f} to {high:.3f})"
        lines.append(
            f"| {seed} | {called[0]} of {len(parts[0])} | {called[1]} of {len(parts[1])} "
            f"| {right} of {len(aimed)} | {area} |"
        )
    return "\n".join(lines)


def _interval(backdoored: torch.Tensor, clean: torch.Tensor) -> tuple[float, float]:
    random = torch.Generator().manual_seed(0)

    def again(scores: torch.Tensor) -> torch.Tensor:
        return scores[torch.randint(len(scores), (len(scores),), generator=random)]

    areas = torch.tensor([auroc(again(backdoored), again(clean)) for _ in range(RESAMPLES)])
    low, high = areas.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verdicts", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--sets", nargs="*", default=["core", "clean"], help="of the zoo")
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--budget", choices=list(BUDGETS), default="standard")
    parser.add_argument(
        "--without-norms",
        action="store_true",
        help="as if the norms remembered nothing, which is what an attacker who estimates their "
        "statistics anew on clean images leaves",
    )
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--out", type=Path, default=_BENCH / "results" / "verdicts.jsonl")
    args = parser.parse_args()
    rows = [
        row
        for row in read_rows(args.out)
        if row.get("budget", "standard") == args.budget
        and row.get("norms", True) != args.without_norms
    ]
    done = {(row["model"], row["seed"], row["clean_samples"]): row for row in rows}
    networks = [network for name in args.sets for network in load_set(name, args.models_dir)]
    if unknown := set(args.models or ()) - {network.name for network in networks}:
        parser.error(f"no set here has {', '.join(sorted(unknown))}")
    networks = [
        network
        for network in networks
        if network.card["fair"] and (not args.models or network.name in args.models)
    ]
    trains = {
        name: load(name, args.data, "train") for name in {one.recipe.dataset for one in networks}
    }
    counts = {name: min(args.clean_samples, len(train)) for name, train in trains.items()}
    for seed in args.seeds:
        for network in networks:
            dataset = network.recipe.dataset
            key = network.name, seed, counts[dataset]
            if key not in done:
                clean = draw_balanced(trains[dataset], counts[dataset], seed)
                done[key] = row_of(network, clean, seed, args)
                append_row(args.out, done[key])
                print(network.name, done[key]["finding"], done[key]["score"], file=sys.stderr)
    wanted = {*counts.values(), args.clean_samples}
    print(summary([row for row in done.values() if row["clean_samples"] in wanted]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
