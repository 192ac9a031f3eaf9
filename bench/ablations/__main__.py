"""``python -m bench.ablations``: what each part of the search adds.

One JSON line per (network, variant, seed, budget), appended when it is done; lines that are there
are not made again. Evidence is made once per network, seed and budget and kept in --work; gates are
shared by the variants that do not change them; one start, without renewal. The true trigger only
scores. A variant's forwards are those of its gates (not in older rows), its search and the final
choice, its seconds without the gates. Rivals get as many forwards for their moves as ``onp`` took;
its own variants as many rounds. ``policy`` and ``policy-no-gnn`` let the gates start from what a
policy proposes that was taught without the network's attack (--agent: what ``bench.train_agent``
wrote), and take fewer steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.ablations.searches import (
    POLICIES,
    RIVALS,
    VARIANTS,
    Measured,
    RivalSearch,
    has,
    without,
)
from bench.ablations.setting import Setting, digest_of, search_of
from bench.files import append_row, read_rows
from bench.scoreboard.provenance import provenance
from bench.scoreboard.rows import der
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.datasets import load
from bench.zoo.folds import attack_fold
from bench.zoo.recipes import CORE, Recipe
from bench.zoo.scoring import Exam
from onp import __version__
from onp.config import BUDGETS, Config
from onp.data import draw_balanced
from onp.errors import UsageError
from onp.suspect.surgery import apply_mask

TEST_SEED = 0
WITHOUT = "without-"
"""A probe family's evidence left out."""
EIGHT = [
    "cifar10_preactresnet18-16_adaptive-blend_10pct_to8_s0",
    "cifar10_preactresnet18-16_wanet_10pct_to9_strength1_s0",
    "cifar10_vgg16_bn-12_badnets-all_10pct_to0_s0",
    "cifar10_vgg16_bn-12_lc_5pct_to3_s0",
    "gtsrb_mobilenetv2-0.25_lf_10pct_to0_s0",
    "gtsrb_mobilenetv2-0.25_trojannn_10pct_to25_s0",
    "gtsrb_resnet20-16_blended_1pct_to1_s0",
    "gtsrb_resnet20-16_ssba_10pct_to2_s0",
]
"""Two networks of each architecture."""
_BENCH = Path(__file__).parents[1]


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    mask: torch.Tensor
    worth: float
    """Of its best mask on the first draw of the images, at the search's prices."""
    cost: float
    """Of the chosen mask, on all clean images."""
    moves_forwards: list[int]
    """Of moves, on each draw of the images: these are what rivals get as well."""
    search_forwards: int
    """Of these and of what is given back."""
    choice_forwards: int


def at_variant(name: str, setting: Setting, recipe: Recipe, policies: Path) -> Setting:
    """What a variant starts from: rivals as ``onp`` does.

    policies: folder of ``bench.train_agent``."""
    config = setting.search.config
    if name.startswith(WITHOUT):
        return Setting.of(without(setting.search, name.removeprefix(WITHOUT)))
    if name in POLICIES:
        file = policies / f"{attack_fold(CORE, recipe)}_{POLICIES[name]}.safetensors"
        if recipe.attack not in json.loads(file.with_suffix(".json").read_text())["kept_out"]:
            raise UsageError(f"{file} was not taught without {recipe.attack}: teach it again")
        return setting.at(replace(config, gates=replace(config.gates, policy=str(file))))
    return setting.at(VARIANTS[name](config)) if name in VARIANTS else setting


def run_variant(name: str, setting: Setting, seed: int, limits: Sequence[int]) -> Found:
    """limits: image-forwards that a rival's moves may take on each draw of the images; the agent's
    own variants end themselves."""
    ledger = setting.search.evaluator.ledger
    started = ledger.total
    search = (
        RivalSearch(setting.search, RIVALS[name], limits, seed)
        if name in RIVALS
        else Measured(setting.search)
    )
    start = search.run(setting.counted, setting.gates, [])
    searched = ledger.total
    choice = search.choose(start.masks, setting.counted)
    spent = search.spent if isinstance(search, Measured) else list(limits)
    return Found(
        choice.mask, start.worth, choice.cost, spent, searched - started, ledger.total - searched
    )


def new_rows(
    network: ZooModel,
    seed: int,
    missing: list[str],
    limits: list[int] | None,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The missing rows of one network and seed, one by one; none where no backdoor is found.

    limits: image-forwards of the moves of the row of ``onp``, where that is there.
    """
    dataset = network.card["dataset"]
    model = network.model.eval()
    images = load(dataset, args.data, "train")
    search = search_of(network, images, args.clean_samples, seed, args.work, args.budget)
    if search is None:
        print(f"{network.name}: no backdoor found with seed {seed}", file=sys.stderr)
        return
    shared = Setting.of(search)
    test = load(dataset, args.data, "test")
    test = draw_balanced(test, min(args.test_images, len(test)), TEST_SEED)
    exam = Exam.of(test, network.attack)
    before = exam.score(model)
    trace = search.evaluator.trace
    for name in missing if limits is not None else ["onp", *(n for n in missing if n != "onp")]:
        if name.startswith(WITHOUT) and not has(search, name.removeprefix(WITHOUT)):
            continue
        setting = at_variant(name, shared, network.recipe, args.agent)
        started = time.process_time()
        found = run_variant(name, setting, seed, limits or [])
        seconds = time.process_time() - started
        limits = found.moves_forwards if name == "onp" else limits
        after = exam.score(apply_mask(model, trace, found.mask).eval())
        assert before.asr is not None
        assert after.asr is not None
        yield (
            {
                "model": network.name,
                "variant": name,
                "seed": seed,
                "budget": args.budget,
                "policy": setting.search.config.gates.policy
                and digest_of(Path(setting.search.config.gates.policy)),
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
                "gates_forwards": setting.gates_forwards,
                "moves_forwards": found.moves_forwards,
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


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: each variant against ``onp`` on the networks and seeds that both have.

    Differences are onp's less the variant's, means over networks, with the smallest and the largest
    of the seeds' means; positive ones speak for onp (shortfall and accuracy lost in points of 100).
    """
    by_case = {(row["variant"], row["model"], row["seed"]): row for row in rows}
    lines = [
        "| variant | cases | worth | CA lost | ASR | DER shortfall | onp's less by (seeds) "
        "| onp loses less CA by (seeds) | image-forwards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        cases = [
            (row, by_case["onp", row["model"], row["seed"]])
            for row in rows
            if row["variant"] == name and ("onp", row["model"], row["seed"]) in by_case
        ]
        own = [row for row, _ in cases]
        shortfall = _by_seed([(row, _shortfall(row) - _shortfall(onp)) for row, onp in cases])
        lost = _by_seed([(row, _lost(row) - _lost(onp)) for row, onp in cases])
        lines.append(
            f"| {name} | {len(own)} | {fmean(r['worth'] for r in own):.4f} "
            f"| {fmean(_lost(r) for r in own):.2f} "
            f"| {100 * fmean(r['asr_after'] for r in own):.2f} "
            f"| {fmean(_shortfall(r) for r in own):.2f} | {shortfall} | {lost} "
            f"| {fmean(map(_forwards, own)):,.0f} |"
        )
    return "\n".join(lines)


def _forwards(row: dict[str, Any]) -> int:
    gates = row.get("gates_forwards", 0)
    return int(gates + row["search_forwards"] + row["choice_forwards"])


def _shortfall(row: dict[str, Any]) -> float:
    return 100 * float(row["der_ceiling"] - row["der"])


def _lost(row: dict[str, Any]) -> float:
    return 100 * float(row["ca_before"] - row["ca_after"])


def _by_seed(values: list[tuple[dict[str, Any], float]]) -> str:
    """Mean, and the smallest and largest of the seeds' means."""
    seeds = {row["seed"] for row, _ in values}
    means = [fmean(value for row, value in values if row["seed"] == seed) for seed in seeds]
    return f"{fmean(v for _, v in values):+.2f} ({min(means):+.2f} to {max(means):+.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ablations", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--models", nargs="*", default=EIGHT, help="networks; default: eight")
    own = [*VARIANTS, *RIVALS, *(WITHOUT + name for name in Config().replay.families)]
    names = [*own, *POLICIES]
    parser.add_argument("--variants", nargs="*", choices=names, default=own)
    parser.add_argument("--budget", choices=list(BUDGETS), default="standard")
    parser.add_argument("--agent", type=Path, default=Path("build/agent"), help="policies")
    parser.add_argument("--work", type=Path, default=Path("build/experience"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=_BENCH / "results" / "ablations.jsonl")
    parser.add_argument("--summary", action="store_true", help="only print the table of --out")
    args = parser.parse_args()
    rows = [
        row
        for row in read_rows(args.out)
        if row.get("budget", "standard") == args.budget
        and row["clean_samples"] == args.clean_samples
    ]
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.summary and any(row.get("onp") != __version__ for row in rows):
        parser.error(f"{args.out} has rows of another version: choose another --out")
    limits = {
        (row["model"], row["seed"]): row["moves_forwards"]
        for row in rows
        if row["variant"] == "onp" and not args.summary
    }
    done = {(row["model"], row["variant"], row["seed"]) for row in rows}
    networks = [] if args.summary else load_set("core", args.models_dir)
    for seed in args.seeds:
        for network in networks:
            if network.attack is None or network.name not in args.models:
                continue
            missing = [n for n in args.variants if (network.name, n, seed) not in done]
            own = limits.get((network.name, seed))
            for row in new_rows(network, seed, missing, own, args) if missing else ():
                append_row(args.out, row)
                rows.append(row)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
