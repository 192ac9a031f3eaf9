"""The package itself in the form of defences: standard, quick, and with what may follow pruning."""

from __future__ import annotations

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
    recalibrate: bool = False,
    finetune: bool = False,
) -> tuple[nn.Module, Info]:
    """Optimized neuron pruning; a network judged clean comes back with nothing pruned."""

    def progress(stage: str, done: int, total: int, message: str) -> None:
        ledger.tick(done, total, f"{stage} {message}".strip())

    try:
        result = sanitize(
            model, clean, seed=seed, budget=budget, recalibrate=recalibrate, finetune=finetune,
            progress=progress,
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


@defence("onp-quick")
def onp_quick(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    budget: str | Config = "quick",
) -> tuple[nn.Module, Info]:
    """The same at the quick budget."""
    return onp_defence(model, clean, seed=seed, ledger=ledger, budget=budget)


@defence("onp-recalibrate")
def onp_recalibrate(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    budget: str | Config = "standard",
) -> tuple[nn.Module, Info]:
    """The norms' statistics estimated anew after pruning: no part of the method."""
    if not has_statistics(model):
        raise NotApplicable("no batch norms with running statistics")
    return onp_defence(model, clean, seed=seed, ledger=ledger, budget=budget, recalibrate=True)


@defence("onp-finetune")
def onp_finetune(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    budget: str | Config = "standard",
) -> tuple[nn.Module, Info]:
    """The weights tuned after pruning: no part of the method."""
    return onp_defence(model, clean, seed=seed, ledger=ledger, budget=budget, finetune=True)
