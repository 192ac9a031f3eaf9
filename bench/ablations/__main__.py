"""``python -m bench.ablations``: what each part of the search adds, at equal image-forwards.

One JSON line per (network, variant, seed), appended when all variants of a network and seed are
done; lines that are there are not made again. Evidence, gates and first masks are made once per
network and seed and shared; one search, without renewal. The true trigger only scores. A variant's
forwards are those of its search and of the final choice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.ablations.searches import RIVALS, VARIANTS
from bench.ablations.setting import Setting, setting_of
from bench.scoreboard.provenance import provenance
from bench.scoreboard.rows import der
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.datasets import load
from bench.zoo.scoring import Exam
from onp.agent.elite import Elite
from onp.config import Config
from onp.data import draw_balanced
from onp.graph import build_graph
from onp.search import Search
from onp.suspect.surgery import apply_mask

TEST_SEED = 0
_BENCH = Path(__file__).parents[1]


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    mask: torch.Tensor
    worth: float
    """Of its best mask, on the images it saw, at the search's prices."""
    cost: float
    """Of the chosen mask, on all clean images."""
    search_forwards: int
    choice_forwards: int


def run_variant(name: str, setting: Setting, seed: int, limit: int) -> Found:
    """limit: image-forwards that a rival's search may take; the agent's own variants end
    themselves."""
    search, ledger = setting.search, setting.search.evaluator.ledger
    started = ledger.total
    if name in VARIANTS:
        config = VARIANTS[name](Config())
        graph = build_graph(search.evaluator.trace, search.scene.model, config.graph)
        scene = replace(search.scene, config=config)
        own = Search(scene, graph, search.shift, search.evidence)
        masks, rounds = own.run(setting.counted, setting.gates, [])
        worth = rounds[-1].worth
    else:
        own, agent = search, search.config.agent
        cost = search.cost(setting.counted, slice(agent.images))
        elite = Elite(search.config.choice.leaders)
        start = search.first_masks(setting.counted, setting.gates)
        elite.offer(start, cost.worth(start))
        left = (limit - (ledger.total - started)) // len(cost.both)
        RIVALS[name](elite, cost, max(0, left), torch.Generator().manual_seed(seed))
        masks, worth = elite.masks, elite.worths[0]
    searched = ledger.total
    choice = own.choose(masks, setting.counted)
    return Found(choice.mask, worth, choice.cost, searched - started, ledger.total - searched)


def rows_of(
    network: ZooModel, seed: int, names: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one network and seed; none where no backdoor is found."""
    dataset = network.card["dataset"]
    model = network.model.eval()
    clean = draw_balanced(load(dataset, args.data, "train"), args.clean_samples, seed)
    setting = setting_of(model, clean, Config(), seed)
    if setting is None:
        print(f"{network.name}: no backdoor found with seed {seed}", file=sys.stderr)
        return []
    test = load(dataset, args.data, "test")
    test = draw_balanced(test, min(args.test_images, len(test)), TEST_SEED)
    exam = Exam.of(test, network.attack)
    before = exam.score(model)
    trace = setting.search.evaluator.trace
    rows, limit = [], 0
    for name in ["onp", *(name for name in names if name != "onp")]:
        started = time.process_time()
        found = run_variant(name, setting, seed, limit)
        seconds = time.process_time() - started
        limit = found.search_forwards if name == "onp" else limit
        after = exam.score(apply_mask(model, trace, found.mask).eval())
        assert before.asr is not None
        assert after.asr is not None
        rows.append(
            {
                "model": network.name,
                "variant": name,
                "seed": seed,
                "clean_samples": args.clean_samples,
                "worth": round(found.worth, 5),
                "cost": round(found.cost, 5),
                "ca_before": before.ca,
                "ca_after": after.ca,
                "asr_before": before.asr,
                "asr_after": after.asr,
                "der": der(before.asr, after.asr, before.ca, after.ca),
                "der_ceiling": (1 + before.asr) / 2,
                "pruned": int(found.mask.sum()),
                "search_forwards": found.search_forwards,
                "choice_forwards": found.choice_forwards,
                "cpu_seconds": round(seconds, 2),
                "test_images": len(test),
            }
            | provenance()
        )
        print(
            f"{network.name} {name} seed {seed}: worth {found.worth:.4f}, "
            f"CA {100 * before.ca:.1f} -> {100 * after.ca:.1f}, "
            f"ASR {100 * before.asr:.1f} -> {100 * after.asr:.1f}, "
            f"{found.search_forwards} image-forwards",
            file=sys.stderr,
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: means over networks of each variant, and the spread of its seeds' means."""
    lines = [
        "| variant | rows | worth | cost | CA drop | ASR | DER shortfall | (over seeds) | "
        "search image-forwards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [*VARIANTS, *RIVALS]:
        own = [row for row in rows if row["variant"] == name]
        if not own:
            continue

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        shortfalls = {
            seed: mean([r["der_ceiling"] - r["der"] for r in own if r["seed"] == seed])
            for seed in sorted({row["seed"] for row in own})
        }
        spread = f"{min(shortfalls.values()):.4f} to {max(shortfalls.values()):.4f}"
        lines.append(
            f"| {name} | {len(own)} | {mean([r['worth'] for r in own]):.4f} "
            f"| {mean([r['cost'] for r in own]):.4f} "
            f"| {100 * mean([r['ca_before'] - r['ca_after'] for r in own]):.2f} "
            f"| {100 * mean([r['asr_after'] for r in own]):.2f} "
            f"| {mean([r['der_ceiling'] - r['der'] for r in own]):.4f} | {spread} "
            f"| {mean([float(r['search_forwards']) for r in own]):,.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ablations", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--models", nargs="*", help="networks; default: all backdoored ones")
    names = [*VARIANTS, *RIVALS]
    parser.add_argument("--variants", nargs="*", choices=names, default=names)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument(
        "--out", type=Path, default=_BENCH / "results" / "scoreboard_core_ablations.jsonl"
    )
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    known = [json.loads(line) for line in lines]
    done = {(row["model"], row["variant"], row["seed"]) for row in known}
    for network in load_set("core", args.models_dir):
        if network.attack is None or (args.models and network.name not in args.models):
            continue
        for seed in args.seeds:
            missing = [n for n in args.variants if (network.name, n, seed) not in done]
            if not missing:
                continue
            fresh = rows_of(network, seed, missing, args)
            fresh = [row for row in fresh if (row["model"], row["variant"], seed) not in done]
            with args.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in fresh)
            known += fresh
    print(summary(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
