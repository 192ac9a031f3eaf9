"""``python -m bench.train_agent``: teach the policy, and see whether it carries over.

It is taught on the core set's backdoored networks and on the small ones of the set practice
(``python -m bench.zoo --set practice --out build/practice``): told what a short look at one draw of
clean images shows, taught by triggers that a longer look at another draw found. For each fold one
is fitted without the networks of some attacks, or of one kind, and judged on the core set's of
those: the worth, on the longer look's images and triggers, of the mask that a repair would begin
with after its proposal, at once and after a few steps of descent, next to descent from open gates.
One is fitted to all; its row is of networks that it was taught on. Only clean images and
synthesised triggers are seen. Rows are printed and written to --table, where those of other folds
stay; weights go to --out, each with its card (data, date, command, scores), for
``GatesConfig.policy``; those that come along are the fold ``all`` of this.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.scoreboard.provenance import provenance
from bench.train_agent.fitting import FittingConfig, fit
from bench.train_agent.lessons import Lesson, Looks, lessons_of
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.folds import folds, kept_out
from bench.zoo.recipes import recipes
from onp.agent.policy import PruningPolicy
from onp.agent.weights import save_policy
from onp.config import BUDGETS, GatesConfig
from onp.files import write_atomically, write_json

_BENCH = Path(__file__).parents[1]


def judged(
    policy: PruningPolicy, lessons: list[Lesson], config: GatesConfig
) -> dict[str, list[float]]:
    """Worth of the first mask, by lesson: as proposed, and after a few steps."""
    proposed = [lesson.closed(policy).detach() for lesson in lessons]
    few = [
        lesson.worth(lesson.adapted(1 - closed, config.adapted_steps, config.adapted_rate))
        for lesson, closed in zip(lessons, proposed, strict=True)
    ]
    at_once = [lesson.worth(closed) for lesson, closed in zip(lessons, proposed, strict=True)]
    return {"at_once": at_once, "adapted": few}


def from_open_gates(lessons: list[Lesson], config: GatesConfig) -> dict[str, list[float]]:
    """The same of descent alone, at its own rate: with as few steps, and with all."""
    return {
        f"open_{steps}": [
            lesson.worth(
                lesson.adapted(torch.ones(len(lesson.features)), steps, config.learning_rate)
            )
            for lesson in lessons
        ]
        for steps in (config.adapted_steps, config.steps)
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_agent", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--practice-dir", type=Path, default=Path("build/practice"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2],
                        help="draws of clean images that the policy is told of")  # fmt: skip
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick",
                        help="of the looks at those; default: quick")  # fmt: skip
    parser.add_argument("--teaching-seed", type=int, default=0,
                        help="draw that a standard look teaches and judges with")  # fmt: skip
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the fitting")
    parser.add_argument("--steps", type=int, default=FittingConfig().steps)
    parser.add_argument("--messages", nargs="*", type=int, default=[1, 0], metavar="ROUNDS",
                        help="of message passing")  # fmt: skip
    parser.add_argument("--folds", nargs="*", help="only these; default: all")
    parser.add_argument("--work", type=Path, default=Path("build/experience"))
    parser.add_argument("--out", type=Path, default=Path("build/agent"))
    parser.add_argument("--table", type=Path, default=_BENCH / "results" / "agent_folds.jsonl")
    args = parser.parse_args()
    made = {**folds(recipes("core")), "all": set[str]()}
    if unknown := set(args.folds or ()) - made.keys():
        parser.error(f"unknown folds {', '.join(sorted(unknown))}; known are {', '.join(made)}")
    if args.teaching_seed in args.seeds:
        parser.error("--teaching-seed is one of --seeds: the same draw would tell and teach")
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    core = backdoored(load_set("core", args.models_dir))
    practice = backdoored(load_set("practice", args.practice_dir))
    looks = Looks(
        args.seeds, args.budget, args.teaching_seed, args.clean_samples, args.data, args.work
    )
    exam = lessons_of(core, looks)
    taught_on = exam + lessons_of(practice, looks)
    gates = BUDGETS[args.budget].gates
    alone = from_open_gates(exam, gates)
    config = FittingConfig(steps=args.steps)
    rows = table_of(args.table)
    for name, fold in made.items():
        if args.folds and name not in args.folds:
            continue
        for rounds in args.messages:
            started = time.perf_counter()
            taught = [one for one in taught_on if not kept_out(fold, one.network.recipe)]
            policy = fit(taught, rounds=rounds, config=config, seed=args.seed)
            seconds = time.perf_counter() - started
            asked = [
                i for i, one in enumerate(exam) if not fold or kept_out(fold, one.network.recipe)
            ]
            found = judged(policy, [exam[i] for i in asked], gates)
            found |= {key: [values[i] for i in asked] for key, values in alone.items()}
            row = {
                "fold": name,
                "kept_out": sorted(fold),
                "messages": rounds,
                "told_by": args.budget,
                "taught_on": len(taught),
                "networks": [f"{exam[i].network.name} seed {exam[i].seed}" for i in asked],
                "worth": {key: [round(v, 4) for v in values] for key, values in found.items()},
                "mean_worth": {key: round(fmean(values), 4) for key, values in found.items()},
                "seconds": round(seconds),
                "steps": config.steps,
                "seed": args.seed,
            }
            print(json.dumps(row), flush=True)
            rows[name, rounds, args.budget] = row | provenance()
            save_policy(policy, args.out / f"{name}_{rounds}.safetensors")
            card = {
                "what": "weights of onp.agent.policy.PruningPolicy",
                "date": datetime.now(UTC).date().isoformat(),
                "command": f"python -m bench.train_agent --steps {config.steps} --folds {name} "
                f"--messages {rounds} --seeds {' '.join(map(str, args.seeds))} "
                f"--teaching-seed {args.teaching_seed} --clean-samples {args.clean_samples} "
                f"--budget {args.budget} --seed {args.seed} --data DATA",
                "judged_on": "networks that it was not taught on"
                if fold
                else "networks that it was taught on",
                "taught_on_networks": sorted({one.network.name for one in taught}),
            }
            write_json(args.out / f"{name}_{rounds}.json", card | rows[name, rounds, args.budget])
            text = "".join(json.dumps(one) + "\n" for one in rows.values())
            write_atomically(args.table, lambda temporary, text=text: temporary.write_text(text))
    return 0


def table_of(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The rows of a table by fold, messages and what tells; what is fitted again takes its row's
    place."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["fold"], row["messages"], row["told_by"]): row for row in map(json.loads, lines)}


def backdoored(networks: list[ZooModel]) -> list[ZooModel]:
    return [n for n in networks if n.recipe.attack != "clean" and n.card["fair"]]


if __name__ == "__main__":
    sys.exit(main())
