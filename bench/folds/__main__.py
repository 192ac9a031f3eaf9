"""``python -m bench.folds``: is the method as good on attacks that it was not fitted on?

Its constants were chosen with the core set in view. Here they are chosen anew for each fold
without the networks of some attacks (four folds), or of one kind (four), by mean DER on the others,
and the policy is one that was taught without them as well (``bench.train_agent``; --agent). In a
second column the counted probes of the family that was made for the attack are dropped, too, where
there are others; the verdict stands. No row has renewal. One JSON line per (network, setting,
family dropped, policy), appended when it is done; lines that are there are not made again. Evidence
is made once and kept in --work.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.ablations.searches import has, without
from bench.ablations.setting import digest_of, search_of
from bench.files import append_row, read_rows
from bench.folds.constants import SHIPPED, Setting, configured, fitted, settings
from bench.scoreboard.provenance import provenance
from bench.scoreboard.rows import der
from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.datasets import load
from bench.zoo.folds import folds, kept_out
from bench.zoo.scoring import Exam
from onp.data import draw_balanced
from onp.search import Search
from onp.suspect.surgery import apply_mask

_BENCH = Path(__file__).parents[1]
TEST_SEED = 0
MADE_FOR = {
    "badnets": "patch", "trojannn": "patch", "lc": "patch",
    "blended": "additive", "adaptive-blend": "additive",
    "sig": "low_frequency", "lf": "low_frequency",
    "wanet": "warp",
    "input-aware": "generator", "ssba": "generator", "bpp": "generator",
}  # fmt: skip
"""The probe family that stands for each attack best; only the generator tells all-to-all."""
Row = dict[str, Any]


class Case:
    """A network with its evidence, ready to be repaired at any setting."""

    def __init__(self, network: ZooModel, args: argparse.Namespace) -> None:
        self.network, self.args = network, args
        self.name = network.name

    @cached_property
    def search(self) -> Search | None:
        dataset, seed = self.network.recipe.dataset, self.args.seed
        images = load(dataset, self.args.data, "train")
        return search_of(self.network, images, self.args.clean_samples, seed, self.args.work)

    @cached_property
    def exam(self) -> Exam:
        test = load(self.network.recipe.dataset, self.args.data, "test")
        test = draw_balanced(test, min(self.args.test_images, len(test)), TEST_SEED)
        return Exam.of(test, self.network.attack)

    def has(self, family: str) -> bool:
        """Whether the search can do without the family's probes, and would miss some."""
        return self.search is not None and has(self.search, family)

    def row(self, setting: Setting, family: str | None, policy: Path | None) -> Row:
        """Gates, search and choice at a setting, without renewal, scored with the true trigger."""
        model = self.network.model
        before = after = self.exam.score(model)
        forwards = 0
        if self.search is not None:
            scene = self.search.scene
            config = configured(scene.config, setting)
            own = None if policy is None else str(policy)
            config = replace(config, gates=replace(config.gates, policy=own))
            scene = replace(scene, config=config)
            search = Search(scene, self.search.graph, self.search.norm_shift, self.search.evidence)
            if family is not None:
                search = without(search, family)
            started = scene.ledger.total
            counted = search.evidence.counted
            with torch.enable_grad():
                masks, _ = search.find(counted, [])
                mask = search.choose(masks, counted).mask
            forwards = scene.ledger.total - started
            after = self.exam.score(apply_mask(model, scene.evaluator.trace, mask).eval())
        assert before.asr is not None
        assert after.asr is not None
        return {
            "model": self.name,
            "setting": list(setting),
            "without": family,
            "policy": named(policy),
            "seed": self.args.seed,
            "clean_samples": self.args.clean_samples,
            "ca_before": before.ca,
            "ca_after": after.ca,
            "asr_before": before.asr,
            "asr_after": after.asr,
            "der": der(before.asr, after.asr, before.ca, after.ca),
            "forwards": forwards,
            "test_images": self.args.test_images,
        } | provenance()


def named(policy: Path | None) -> str:
    """``none``, or a policy's fold and digest."""
    if policy is None:
        return "none"
    return f"{policy.stem}_{digest_of(policy)}"


class Rows:
    """The file of rows: what is there is not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made = {self._key(row): row for row in read_rows(path)}

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        names = ("model", "without", "policy", "seed", "clean_samples", "test_images")
        return (*(row[name] for name in names), tuple(row["setting"]))

    def get(self, case: Case, setting: Setting, family: str | None, policy: Path | None) -> Row:
        args = case.args
        key = (
            case.name, family, named(policy), args.seed, args.clean_samples, args.test_images,
            setting,
        )  # fmt: skip
        if key not in self.made:
            started = time.perf_counter()
            row = self.made[key] = case.row(setting, family, policy)
            append_row(self.path, row)
            print(f"{key}: DER {row['der']:.3f}, {time.perf_counter() - started:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
        return self.made[key]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.folds", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with cifar10.zip and gtsrb.zip")
    parser.add_argument("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    parser.add_argument("--agent", type=Path, help="policies of bench.train_agent; default: none")
    parser.add_argument("--messages", type=int, default=1, help="of those policies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean-samples", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--work", type=Path, default=Path("build/experience"))
    parser.add_argument("--out", type=Path, default=_BENCH / "results" / "folds.jsonl")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out)
    networks = [n for n in load_set("core", args.models_dir) if n.recipe.attack != "clean"]
    cases = {network.name: Case(network, args) for network in networks}

    def policy_of(fold: str) -> Path | None:
        own = f"{fold}_{args.messages}.safetensors"
        return None if args.agent is None else args.agent / own

    for case in cases.values():  # one network after the other: its search is in memory
        for setting in settings():
            rows.get(case, setting, None, None)

    def ders(setting: Setting) -> dict[str, float]:
        return {name: rows.get(case, setting, None, None)["der"] for name, case in cases.items()}

    lines = ["| folds | as shipped | constants and weights left out | and the probe family |",
             "|---|---|---|---|"]  # fmt: skip
    found: dict[str, list[tuple[float, float, float]]] = {}
    for fold, parts in folds(network.recipe for network in networks).items():
        kind = "attacks" if fold.startswith("attacks") else "kinds"
        out = {network.name for network in networks if kept_out(parts, network.recipe)}
        setting = fitted(ders, out)
        print(f"{fold}: {setting}", file=sys.stderr, flush=True)
        for name in sorted(out):
            case = cases[name]
            family = MADE_FOR.get(case.network.recipe.attack)
            unseen = rows.get(case, setting, None, policy_of(fold))
            alone = unseen
            if family is not None and case.has(family):
                alone = rows.get(case, setting, family, policy_of(fold))
            as_shipped = rows.get(case, SHIPPED, None, None)
            found.setdefault(kind, []).append((as_shipped["der"], unseen["der"], alone["der"]))
    for kind, triples in found.items():
        means = (f"{fmean(column):.3f}" for column in zip(*triples, strict=True))
        lines.append(f"| {kind} | {' | '.join(means)} |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
