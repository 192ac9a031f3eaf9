"""The package itself in the form of defences: standard, quick, and with what may follow pruning."""

from __future__ import annotations

from functools import partial

from torch import nn

from bench.defences.api import Info, NotApplicable, defence
from onp.aftercare import has_statistics
from onp.config import Config
from onp.data import ImageSet
from onp.errors import UntraceableModel
from onp.ledger import Ledger
from onp.sanitize import sanitize


@defence("onp")
def onp_defence(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    budget: str | Config = "standard",
    target: int | None = None,
    recalibrate: bool = False,
    finetune: bool = False,
) -> tuple[nn.Module, Info]:
    """Optimized neuron pruning; a network judged clean comes back with nothing pruned."""

    if recalibrate and not has_statistics(model):
        raise NotApplicable("no batch norms with running statistics")

    def progress(stage: str, done: int, total: int, message: str) -> None:
        ledger.tick(done, total, f"{stage} {message}".strip())

    try:
        result = sanitize(
            model, clean, seed=seed, budget=budget, target=target,
            recalibrate=recalibrate, finetune=finetune, progress=progress,
        )  # fmt: skip
    except UntraceableModel as error:
        raise NotApplicable(f"the network cannot be traced: {error}") from error
    report = result.report
    ledger.count(report["image_forwards"]["total"])
    settings = {
        "verdict": result.verdict,
        "score": report["score"],
        "target_classes": report["target_classes"],
        "pruned": report["sites"]["pruned"],
        "sites": report["sites"]["total"],
    }
    name = budget if isinstance(budget, str) else budget.budget
    return result.model, Info(schedule=f"{name} budget", settings=settings)


defence("onp-quick")(partial(onp_defence, budget="quick"))
defence("onp-thorough")(partial(onp_defence, budget="thorough"))
defence("onp-recalibrate")(partial(onp_defence, recalibrate=True))
defence("onp-finetune")(partial(onp_defence, finetune=True))
defence("onp-quick-finetune")(partial(onp_defence, budget="quick", finetune=True))
"""The last three change what pruning left: no part of the method."""
