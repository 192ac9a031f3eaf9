"""What the package's fine-tuning does where nothing was pruned: the same verdict, the same probes.

Not a method of anyone; it says what pruning first is worth.
"""

from __future__ import annotations

import copy

from torch import nn

from bench.ablations.setting import investigate
from bench.defences.api import Info, defence
from onp.aftercare import finetuned
from onp.config import BUDGETS, Config
from onp.data import ImageSet
from onp.ledger import Ledger


@defence("probe-tune")
def probe_tune(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    config: Config = BUDGETS["standard"],
) -> tuple[nn.Module, Info]:
    """Tune the suspect's weights on clean images and the counted probes."""
    found = investigate(model, clean, config, seed)
    scene, evidence = found.scene, found.evidence
    tuned = copy.deepcopy(scene.model)
    if evidence.verdict.target is not None:
        tuned = finetuned(
            scene.model, scene.model, scene.clean.images, scene.clean.labels,
            [contender.probe for contender in evidence.counted], config.aftercare,
            seed=seed, ledger=scene.evaluator.ledger,
        )  # fmt: skip
    ledger.count(scene.evaluator.ledger.total)
    settings = {"verdict": evidence.verdict.finding, "probes": len(evidence.counted)}
    return tuned, Info(schedule=f"{config.budget} budget", settings=settings)
