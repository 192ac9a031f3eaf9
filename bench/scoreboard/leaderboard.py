"""BackdoorBench's public results, as context: other networks, other data, other machines."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bench.scoreboard.rows import der
from bench.scoreboard.summary import REPAIRED_ASR, REPAIRED_DROP
from onp.errors import BadData
from onp.files import file_error

REPAIRS = {
    "ft": "FT",
    "fp": "FP",
    "nad": "NAD",
    "nc": "NC",
    "anp": "ANP",
    "clp": "CLP",
    "dde": "EP",
    "mbns": "BNP",
    "i-bau": "I-BAU",
}
"""Names in the file of defences that repair a trained network; the others train anew."""

MIN_BASE_ASR, MIN_BASE_CA = 0.5, 0.3
"""Networks on which the attack or the training failed say nothing of a defence."""

_FIELDS = ("dataset", "backbone", "attack_name", "defense_name", "ratio", "test_acc", "test_asr")


@dataclass(frozen=True)
class PublicMean:
    """One defence on one data set and backbone, over attacks and poisoning ratios."""

    defence: str
    cases: int
    ca_drop: float
    asr_after: float
    der: float
    repaired: float


def public_means(path: Path, dataset: str, backbone: str) -> list[PublicMean]:
    """Means of ``static/data/results.csv`` of github.com/backdoorbench/backdoorbench.github.io.

    Empty and failed (-1) rows are left out, as are networks whose undefended row is missing or ill
    trained. Raises BadData for a file of another form.
    """
    scores = _scores(path, dataset, backbone)
    means = []
    for key, name in REPAIRS.items():
        pairs = [
            (scores[base], after)
            for (attack, ratio, defence), after in scores.items()
            if defence == key and (base := (attack, ratio, "no defense")) in scores
        ]
        pairs = [(b, a) for b, a in pairs if b[0] > MIN_BASE_CA and b[1] > MIN_BASE_ASR]
        if not pairs:
            continue
        drops = [before[0] - after[0] for before, after in pairs]
        means.append(
            PublicMean(
                defence=name,
                cases=len(pairs),
                ca_drop=fmean(drops),
                asr_after=fmean(after[1] for _, after in pairs),
                der=fmean(der(b[1], a[1], b[0], a[0]) for b, a in pairs),
                repaired=fmean(
                    after[1] < REPAIRED_ASR and drop < REPAIRED_DROP
                    for (_, after), drop in zip(pairs, drops, strict=True)
                ),
            )
        )
    return means


def _scores(
    path: Path, dataset: str, backbone: str
) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(attack, ratio, defence) to (CA, ASR), shares in [0, 1]."""
    scores = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(_FIELDS) - set(reader.fieldnames or ())
            if missing:
                raise BadData(f"{path}: no columns {', '.join(sorted(missing))}")
            for row in reader:
                if (row["dataset"], row["backbone"]) != (dataset, backbone):
                    continue
                if row["test_acc"] == "" or row["test_asr"] == "":
                    continue
                ca, asr = float(row["test_acc"]), float(row["test_asr"])
                if ca >= 0 and asr >= 0:
                    scores[row["attack_name"], row["ratio"], row["defense_name"]] = (ca, asr)
    except OSError as error:
        raise file_error("read", path, error) from None
    except ValueError as error:
        raise BadData(f"{path}: {error}") from None
    return scores
