"""``python -m bench.train_agent``: does what a policy learns carry over to other networks?

Moves are tried on the core set's backdoored networks (kept in --work, so that a call can be
interrupted). For each fold a policy is fitted without the networks of some attacks, or of one kind,
and scored on those: how far the gains of moves are from what it foresees, next to the policy as it
starts; and one is fitted to all. Rewards come from clean images and synthesised triggers alone.
Weights go to --out, for ``AgentConfig.weights``, and a table is printed and written to --table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.ablations.setting import setting_of
from bench.scoreboard.provenance import provenance
from bench.train_agent.experience import Lesson, explore, load, save
from bench.train_agent.fitting import FittingConfig, fit, loss_on, untrained
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.datasets import load as load_images
from onp.agent.policy import CautionPolicy
from onp.agent.weights import save_policy
from onp.config import AgentConfig, Config
from onp.data import draw_balanced
from onp.files import write_atomically
from onp.graph import build_graph
from onp.suspect.trace import trace

_BENCH = Path(__file__).parents[1]
ATTACK_FOLDS = 4


def folds(networks: list[ZooModel]) -> dict[str, set[str]]:
    """Names of the networks that each fold keeps out: attacks in four parts, and every
    architecture."""
    attacks = sorted({network.recipe.attack for network in networks})
    made = {
        f"attacks{part}": {
            n.name for n in networks if n.recipe.attack in attacks[part::ATTACK_FOLDS]
        }
        for part in range(ATTACK_FOLDS)
    }
    for arch in sorted({network.recipe.arch for network in networks}):
        made[arch] = {network.name for network in networks if network.recipe.arch == arch}
    return made


def lesson_of(network: ZooModel, seed: int, args: argparse.Namespace) -> Lesson | None:
    """What was met on a network; None where no backdoor is found in it."""
    path = args.work / f"{network.name}_seed{seed}.pt"
    model = network.model.eval()
    if path.exists():
        graph = build_graph(trace(model, (3, 32, 32)), model, Config().graph)
        return load(path, network.name, graph)
    clean = draw_balanced(
        load_images(network.card["dataset"], args.data, "train"), args.clean_samples, seed
    )
    setting = setting_of(model, clean, Config(), seed)
    if setting is None:
        return None
    lesson = explore(network.name, setting, seed)
    save(lesson, path)
    return lesson


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_agent", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], help="of the clean images")
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the fitting")
    parser.add_argument("--work", type=Path, default=Path("build/experience"))
    parser.add_argument("--out", type=Path, default=Path("build/agent"))
    parser.add_argument("--table", type=Path, default=_BENCH / "results" / "agent_folds.jsonl")
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    networks = [n for n in load_set("core", args.models_dir) if n.attack is not None]
    lessons: list[Lesson] = []
    for seed in args.seeds:
        for network in networks:
            lesson = lesson_of(network, seed, args)
            met = 0 if lesson is None else len(lesson.met)
            print(f"{network.name} seed {seed}: {met} states", file=sys.stderr, flush=True)
            lessons += [lesson] if lesson is not None else []
    lines = []
    for messages in (AgentConfig().messages, 0):
        for fold, kept_out in {**folds(networks), "all": set[str]()}.items():
            met_on = {lesson.name for lesson in lessons}
            if not met_on - kept_out or (kept_out and not met_on & kept_out):
                print(f"{fold}: nothing to learn from, or to judge by", file=sys.stderr)
                continue
            row, policy = fold_of(fold, kept_out, lessons, messages, args.seed)
            row |= {"networks": len(networks), "seeds": args.seeds, "seed": args.seed}
            lines.append(json.dumps(row | provenance()))
            print(lines[-1], flush=True)
            save_policy(policy, args.out / f"{fold}_{messages}.safetensors")
    text = "\n".join(lines) + "\n"
    write_atomically(args.table, lambda temporary: temporary.write_text(text))
    return 0


def fold_of(
    fold: str, kept_out: set[str], lessons: list[Lesson], messages: int, seed: int
) -> tuple[dict[str, Any], CautionPolicy]:
    """A policy fitted without some networks, and its loss on those (on all where none is kept out),
    next to that of the policy as it starts."""
    started = time.perf_counter()
    agent = AgentConfig(messages=messages)
    learned_on = [lesson for lesson in lessons if lesson.name not in kept_out]
    judged = [lesson for lesson in lessons if lesson.name in kept_out] or lessons
    policy = fit(learned_on, agent, FittingConfig(), seed)
    row = {
        "fold": fold,
        "messages": messages,
        "kept_out": len(kept_out),
        "loss": round(loss_on(policy, judged), 4),
        "loss_untrained": round(loss_on(untrained(judged, agent, seed), judged), 4),
        "seconds": round(time.perf_counter() - started),
    }
    return row, policy


if __name__ == "__main__":
    sys.exit(main())
