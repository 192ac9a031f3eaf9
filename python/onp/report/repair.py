"""The JSON report of a repair. ``docs/report.md`` describes the schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from onp.aftercare import AftercareOutcome
from onp.agent.choice import Choice
from onp.environment import describe
from onp.evidence import Evidence
from onp.metrics import interval
from onp.probes.contenders import strength
from onp.probes.margin import Margins
from onp.probes.norm_shift import NormShift
from onp.probes.probe import OneClass, Probe, Target, classes_of
from onp.probes.race import Contender
from onp.pruning import Pruning
from onp.scene import ROAMING, Scene, Squares

SCHEMA = "onp.repair/13"


def repair_report(
    scene: Scene,
    shift: NormShift | None,
    evidence: Evidence,
    pruning: Pruning,
    right: Tensor,
    cared: AftercareOutcome | None,
    told: int | None,
    prefix: str,
) -> dict[str, Any]:
    """Everything a reader needs to see why; JSON-able. right: bool [2, N], answers before and
    after that are the label's. told: the class that was named as suspect. prefix: what the names of
    the suspect's modules begin with in the trace."""
    trace, ledger, mask = scene.evaluator.trace, scene.ledger, pruning.mask
    verdict, unlearning = evidence.verdict, evidence.unlearning
    count = right.shape[1]
    before, after = (int(row.sum()) for row in right)
    return {
        "schema": SCHEMA,
        "verdict": verdict.finding,
        "reason": verdict.reason,
        "score": round(verdict.score, 4),
        "evidence": {
            "by": verdict.by,
            **{name: round(value, 4) for name, value in verdict.evidence.items()},
        },
        "statistics": None if evidence.statistics is None else evidence.statistics.evidence,
        "norm_shift": None if shift is None else round(shift.excess, 4),
        "source_class": verdict.target.source if isinstance(verdict.target, OneClass) else None,
        "target_classes": [one for target in verdict.targets for one in classes_of(target)],
        "told_class": told,
        "accuracy": {
            "before": before / count,
            "after": after / count,
            "images": count,
            "interval_before": [round(x, 4) for x in interval(before, count)],
            "interval_after": [round(x, 4) for x in interval(after, count)],
        },
        "aftercare": None if cared is None else _aftercare(cared),
        "sites": {"total": trace.sites, "pruned": int(mask.sum())},
        "layers": [
            {
                "name": layer.name.removeprefix(prefix),
                "sites": layer.channels,
                "pruned": mask[layer.sites].nonzero().squeeze(1).tolist(),
            }
            for layer in trace.layers
        ],
        "unlearned_answers": None if unlearning is None else unlearning.answers.tolist(),
        "looks": _looks(evidence.looked),
        "squares": None if evidence.squares is None else _squares(evidence.squares),
        "margins": None if evidence.margins is None else _margins(evidence.margins),
        "probes": [_probe(c, c in pruning.counted) for c in evidence.contenders],
        "renewed_probes": [_probe(c, True) for c in pruning.renewed],
        "choice": None if pruning.choice is None else _choice(pruning.choice),
        "rounds": [{k: round(v, 5) for k, v in asdict(log).items()} for log in pruning.rounds],
        "image_forwards": {**ledger.forwards, "total": ledger.total},
        "seconds": {
            **{stage: round(seconds, 3) for stage, seconds in ledger.seconds.items()},
            "total": round(sum(ledger.seconds.values()), 3),
        },
        "seed": scene.seed,
        "input_range": list(scene.valid),
        "backend": scene.evaluator.backend,
        "precision": scene.evaluator.precision,
        "device": str(scene.evaluator.network.device),
        "config": asdict(scene.config),
        "environment": describe(),
    }


def _probe(contender: Contender, counted: bool) -> dict[str, Any]:
    target, raced = contender.probe.target, contender.size > 0
    left = contender.success * (1 - contender.removed)
    return {
        "family": contender.probe.family.name,
        "target": _named(target),
        "size": _size(contender.probe),
        "success_before": round(contender.success, 4),
        "success_after_its_own_mask": round(left, 4) if raced else None,
        "worth": round(contender.score, 4) if raced else None,
        "sites": contender.size,
        "counted": counted,
    }


def _size(probe: Probe) -> float | None:
    return round(probe.size, 4) if math.isfinite(probe.size) else None


def _named(target: Target) -> int | str:
    return target if isinstance(target, int) else str(target)


def _looks(looked: Sequence[Contender]) -> list[dict[str, Any]]:
    """The strongest first."""
    return [
        {
            "family": one.probe.family.name,
            "target": one.probe.target,
            "size": _size(one.probe),
            "success": round(one.success, 4),
        }
        for one in sorted(looked, key=lambda one: -strength(one.success, one.probe.size))
    ]


def _squares(squares: Squares) -> list[dict[str, Any]]:
    """The best one of each target, those that work best first."""
    best, places = squares.successes.max(0)
    rows = zip(squares.targets, places.tolist(), best.tolist(), strict=True)
    return [
        {
            "target": _named(target),
            "place": "anywhere" if place == ROAMING else place,
            "success": round(success, 4),
        }
        for target, place, success in sorted(rows, key=lambda row: -row[2])
    ]


def _margins(margins: Margins) -> list[dict[str, Any]]:
    """Of each class, the largest first."""
    rows = zip(margins.classes, margins.driven.tolist(), margins.natural.tolist(), strict=True)
    return [
        {
            "target": target,
            "margin": round(driven, 4),
            "natural": round(natural, 4) if math.isfinite(natural) else None,
        }
        for target, driven, natural in sorted(rows, key=lambda row: -row[1])
    ]


def _aftercare(cared: AftercareOutcome) -> dict[str, Any]:
    return {
        "recalibrated": cared.done.recalibrate,
        "finetuned": cared.done.finetune,
        "accuracy": cared.accuracy,
    }


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "cost": round(choice.cost, 5),
        "crossfitted_cost": round(choice.crossfit, 5),
        "interval": [round(x, 5) for x in choice.interval],
        "probe_success_before": [round(x, 4) for x in choice.success_before],
        "probe_success_after": [round(x, 4) for x in choice.success_after],
    }
