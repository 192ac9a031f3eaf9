"""``python -m bench.search_precision``: what a search in 8 bits, or bf16, does to what it is told.

Repairs the backdoored networks of the core set and evaluates every mask that the search asks for in
fp32 as well, which the search does not see: how far logits and answers agree, and whether masks
rank alike by their worth. One JSON line a network; exit code 2 where this processor has no
instructions for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.scoreboard.provenance import provenance
from bench.zoo.checkpoints import load_set
from bench.zoo.datasets import load
from onp.agent.cost import Cost, Parts
from onp.config import BUDGETS, SearchPrecision
from onp.data import draw_balanced
from onp.files import write_atomically
from onp.ops.masked_forward import bytes_pay, halves_pay
from onp.sanitize import sanitize

_BENCH = Path(__file__).parent
MARGIN = 0.5
"""Lead of the best logit over the second, in fp32, below which an answer may change."""


@dataclass
class Comparison:
    """Of all evaluations of one repair's search."""

    worths: dict[Cost, list[Tensor]] = field(default_factory=dict)
    """On the images of each cost that was asked, float32 [2, B] an evaluation: rough and exact."""
    squares: float = 0.0
    """Of errors of the logits,"""
    spread: float = 0.0
    """and of the exact ones around their mean; sums."""
    answers: int = 0
    changed: int = 0
    sure: int = 0
    """Answers beyond the margin,"""
    changed_sure: int = 0
    """and those of them that changed."""
    largest: float = 0.0
    """Margin of an answer that changed."""

    def add(self, cost: Cost, pruned: Tensor, rough: Parts) -> None:
        """Evaluate in fp32 what was evaluated in less."""
        run = cost.evaluator.run
        close, exact = run(pruned, cost.both, rough=True), run(pruned, cost.both)
        best = exact.topk(2, 2).values
        margin, changed = best[..., 0] - best[..., 1], close.argmax(2) != exact.argmax(2)
        self.squares += float((close - exact).square().sum())
        self.spread += float((exact - exact.mean()).square().sum())
        self.answers += changed.numel()
        self.changed += int(changed.sum())
        self.sure += int((margin > MARGIN).sum())
        self.changed_sure += int((changed & (margin > MARGIN)).sum())
        self.largest = max(self.largest, float(margin[changed].max()) if changed.any() else 0.0)
        cost.exact = True
        worth = cost.worth(pruned, cost.parts(pruned))
        cost.exact = False
        both = torch.stack([cost.worth(pruned, rough), worth])
        self.worths.setdefault(cost, []).append(both)

    def row(self) -> dict[str, Any]:
        draws = [torch.cat(parts, 1) for parts in self.worths.values()]
        pairs = [(rough, exact) for rough, exact in draws if len(exact) > 1]
        within = [rank_correlation(rough, exact) for rough, exact in pairs]
        alike = [int(rough.argmax()) == int(exact.argmax()) for rough, exact in pairs]
        every = rank_correlation(*torch.cat(draws, 1))
        return {
            "costs": len(pairs),
            "masks": sum(draw.shape[1] for draw in draws),
            "logit_error": round((self.squares / self.spread) ** 0.5, 5),
            "answers_changed": round(self.changed / self.answers, 5),
            "changed_beyond_margin": round(self.changed_sure / max(self.sure, 1), 6),
            "margin": MARGIN,
            "largest_margin_changed": round(self.largest, 3),
            "rank_correlation": round(every, 5),
            "rank_correlation_within": round(sum(within) / len(within), 4),
            "rank_correlation_least": round(min(within), 3),
            "same_best": round(sum(alike) / len(alike), 3),
        }


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of float32 [n] without ties, n > 1."""
    ranks = torch.stack([values.argsort().argsort().float() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


@contextmanager
def compared() -> Iterator[Comparison]:
    """Every evaluation that searches make in less than fp32 meanwhile."""
    found, parts = Comparison(), Cost.parts

    def both(self: Cost, pruned: Tensor) -> Parts:
        rough = parts(self, pruned)
        if not self.exact and self.evaluator.rough_plan is not None and len(pruned):
            Cost.parts = parts  # type: ignore[method-assign]
            found.add(self, pruned, rough)
            Cost.parts = both  # type: ignore[method-assign]
        return rough

    Cost.parts = both  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Cost.parts = parts  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.search_precision", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10.zip, gtsrb.zip"
    )
    parser.add_argument("--models", nargs="*", default=[""], help="parts of names; default: all")
    parser.add_argument("--precision", choices=["int8", "bf16"], default="int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_BENCH / "results" / "search_precision.jsonl")
    args = parser.parse_args()
    precision: SearchPrecision = args.precision
    if not (bytes_pay() if precision == "int8" else halves_pay()):
        needed = "VNNI" if precision == "int8" else "BF16"
        print(f"this processor has no AVX-512 {needed}: its searches are in fp32", file=sys.stderr)
        return 2
    rows = []
    for network in load_set("core", _BENCH / "zoo" / "models"):
        if network.attack is None or not any(part in network.name for part in args.models):
            continue
        images = load(network.recipe.dataset, args.data, "train")
        with compared() as found:
            clean = draw_balanced(images, 500, args.seed)
            config = replace(BUDGETS["standard"], search_precision=precision)
            result = sanitize(network.model, clean, seed=args.seed, budget=config)
        row: dict[str, Any] = {"model": network.name, "seed": args.seed}
        row |= {"precision": result.report["precision"]}
        if found.worth:
            row |= found.row()
        rows.append(json.dumps(row | provenance()))
        print(rows[-1], flush=True)
        text = "".join(f"{line}\n" for line in rows)
        write_atomically(args.out, lambda path, text=text: path.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
