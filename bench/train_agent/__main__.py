"""``python -m bench.train_agent``: teach the policy, and see whether it carries over.

It is taught on the core set's backdoored networks and on the small ones of the set practice
(``python -m bench.zoo --set practice --out build/practice``). For each fold one is fitted without
the networks of some attacks, or of one kind, and judged on the core set's of those: the worth of
the best mask that its proposal gives at once, and after a few steps of descent, next to descent
from open gates. One is fitted to all: that one comes along. Only clean images and synthesised
triggers are seen. A table is printed and written to --table, weights to --out; with --ship the one
that is fitted to all goes into the package, with its card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.scoreboard.provenance import provenance
from bench.train_agent.fitting import FittingConfig, fit
from bench.train_agent.lessons import Lesson, lessons_of
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.recipes import Recipe
from onp.agent.policy import PruningPolicy
from onp.agent.weights import SHIPPED, save_policy
from onp.config import GatesConfig
from onp.files import write_atomically, write_json

_BENCH = Path(__file__).parents[1]
ATTACK_FOLDS = 4
FEW = 8
"""Steps of descent that a proposal is adapted with,"""
GENTLE = 0.03
"""at this rate; from open gates as many are tried at the rate of a repair."""


def folds(networks: Iterable[ZooModel]) -> dict[str, set[str]]:
    """Attacks, or architectures, that each fold keeps out: attacks in four parts, and every
    architecture."""
    recipes = [network.recipe for network in networks]
    attacks = sorted({recipe.attack for recipe in recipes})
    made = {f"attacks{part}": set(attacks[part::ATTACK_FOLDS]) for part in range(ATTACK_FOLDS)}
    return made | {arch: {arch} for arch in sorted({recipe.arch for recipe in recipes})}


def kept_out_of(fold: set[str], recipe: Recipe) -> bool:
    """Whether a network, of whatever set, has an attack or an architecture of the fold's."""
    return bool(fold & {recipe.attack, recipe.arch})


def judged(policy: PruningPolicy, lessons: list[Lesson]) -> dict[str, list[float]]:
    """Worth of the best first mask, by lesson: as proposed, and after a few steps."""
    proposed = [lesson.closed(policy).detach() for lesson in lessons]
    few = [
        lesson.worth(lesson.adapted(1 - closed, FEW, GENTLE))
        for lesson, closed in zip(lessons, proposed, strict=True)
    ]
    at_once = [lesson.worth(closed) for lesson, closed in zip(lessons, proposed, strict=True)]
    return {"at_once": at_once, "adapted": few}


def from_open_gates(lessons: list[Lesson], config: GatesConfig) -> dict[str, list[float]]:
    """The same of descent alone: with as few steps, and with all."""
    return {
        f"open_{steps}": [
            lesson.worth(
                lesson.adapted(torch.ones(len(lesson.features)), steps, config.learning_rate)
            )
            for lesson in lessons
        ]
        for steps in (FEW, config.steps)
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_agent", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--practice-dir", type=Path, default=Path("build/practice"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the clean images")
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the fitting")
    parser.add_argument("--steps", type=int, default=FittingConfig().steps)
    parser.add_argument("--messages", nargs="*", type=int, default=[1, 0], metavar="ROUNDS",
                        help="of message passing; the first is shipped")  # fmt: skip
    parser.add_argument("--folds", nargs="*", help="only these; default: all")
    parser.add_argument("--work", type=Path, default=Path("build/experience"))
    parser.add_argument("--out", type=Path, default=Path("build/agent"))
    parser.add_argument("--table", type=Path, default=_BENCH / "results" / "agent_folds.jsonl")
    parser.add_argument("--ship", action="store_true", help="put the policy into the package")
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    core = backdoored(load_set("core", args.models_dir))
    practice = backdoored(load_set("practice", args.practice_dir))
    exam = lessons_of(core, args.seeds, args.data, args.clean_samples, args.work)
    taught_on = exam + lessons_of(practice, args.seeds, args.data, args.clean_samples, args.work)
    alone = from_open_gates(exam, GatesConfig())
    config, lines = FittingConfig(steps=args.steps), []
    for name, kept_out in {**folds(core), "all": set[str]()}.items():
        if args.folds and name not in args.folds:
            continue
        for rounds in args.messages:
            started = time.perf_counter()
            taught = [one for one in taught_on if not kept_out_of(kept_out, one.network.recipe)]
            policy = fit(
                taught,
                rounds=rounds, config=config, seed=args.seed,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            asked = [
                i
                for i, one in enumerate(exam)
                if not kept_out or kept_out_of(kept_out, one.network.recipe)
            ]
            found = judged(policy, [exam[i] for i in asked])
            found |= {key: [values[i] for i in asked] for key, values in alone.items()}
            row = {
                "fold": name,
                "messages": rounds,
                "taught_on": len(taught),
                "networks": [f"{exam[i].network.name} seed {exam[i].seed}" for i in asked],
                "worth": {key: [round(v, 4) for v in values] for key, values in found.items()},
                "mean_worth": {key: round(fmean(values), 4) for key, values in found.items()},
                "seconds": round(seconds),
                "steps": config.steps,
                "seed": args.seed,
            }
            lines.append(json.dumps(row | provenance()))
            print(lines[-1], flush=True)
            save_policy(policy, args.out / f"{name}_{rounds}.safetensors")
            if args.ship and name == "all" and rounds == args.messages[0]:
                save_policy(policy, SHIPPED)
                write_json(SHIPPED.with_suffix(".json"), card(row))
    text = "\n".join(lines) + "\n"
    write_atomically(args.table, lambda temporary: temporary.write_text(text))
    return 0


def backdoored(networks: list[ZooModel]) -> list[ZooModel]:
    return [n for n in networks if n.recipe.attack != "clean" and n.card["fair"]]


def card(row: dict[str, Any]) -> dict[str, Any]:
    """What comes along with the weights."""
    return {
        "what": "onp.agent.policy.PruningPolicy",
        "command": " ".join(["python -m bench.train_agent", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "data": "CIFAR-10 and GTSRB: clean images and triggers synthesised on them",
        **row,
        **provenance(),
    }


if __name__ == "__main__":
    sys.exit(main())
