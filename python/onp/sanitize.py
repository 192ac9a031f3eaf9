"""The story, top to bottom: suspect -> graph -> evidence -> search -> mask -> result."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from onp.aftercare import Aftercare, AftercareOutcome, care_for
from onp.arguments import checked_target, config_of, torch_settings
from onp.config import Config
from onp.data import ImageSet, Preprocess
from onp.evaluate import Backend
from onp.evidence import gather, measured_shift
from onp.graph import build_graph
from onp.ledger import Ledger, Progress, silent
from onp.prepare import opened, unwrapped
from onp.pruning import applied, prune
from onp.report.repair import repair_report
from onp.result import Result
from onp.suspect.surgery import remove_mask
from onp.suspect.trace import Trace


@torch.inference_mode(False)
@torch.enable_grad()
def sanitize(
    model: nn.Module,
    clean: ImageSet | Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int = 0,
    budget: str | Config = "standard",
    target: SupportsIndex | None = None,
    device: str | torch.device | None = None,
    input_range: tuple[float, float] = (0.0, 1.0),
    preprocess: Preprocess | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
    recalibrate: bool = False,
    finetune: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Repair an image classifier that may carry a backdoor, from a few hundred clean images.

    Args:
        model: any traceable module from images [N, C, H, W] to logits [N, K]; never changed.
        clean: labelled clean images: an ``ImageSet`` or an iterable of (images, labels) batches.
        seed: same seed, threads, torch and instruction set: same bytes.
        budget: ``quick``, ``standard``, ``thorough`` or a ``Config``.
        target: a class that you suspect a backdoor of: it is repaired whatever the evidence says.
        device: where torch computes; default: where the model is.
        input_range: smallest and largest valid value of ``clean``'s images, so that synthesised
            triggers stay real images.
        preprocess: normalisation to put in front of the model, where it is not inside.
        backend: how masks are evaluated, ``auto``, ``native`` or ``torch``.
        threads: CPU threads; default: torch's.
        recalibrate: after pruning, estimate the batch norms' statistics anew on ``clean``.
        finetune: after pruning, tune the weights on ``clean``; pruned sites stay pruned.
        progress: hears of (stage, done, total, message).

    Raises an ``onp.errors.OnpError`` that says what is wrong with the model or the data.
    """
    config = config_of(budget)
    ledger = Ledger(progress or silent)
    aftercare = Aftercare(recalibrate, finetune)
    with torch_settings(threads):
        with ledger.stage("prepare"):
            scene = opened(
                model, clean, config, seed=seed, ledger=ledger, device=device,
                input_range=input_range, preprocess=preprocess, backend=backend,
            )  # fmt: skip
            trace, suspect, seen = scene.evaluator.trace, scene.model, scene.clean
            aftercare.check(suspect)
            told = checked_target(target, seen.labels, trace.num_classes)
            graph = build_graph(trace, suspect, config.graph)
        with ledger.stage("statistics"):
            shift = measured_shift(scene)
        evidence = gather(scene, shift, told)
        pruning = prune(scene, graph, shift, evidence)
        with ledger.stage("finish"):
            pruned, right = applied(scene, pruning.mask)
        cared: AftercareOutcome | None = None
        if aftercare and bool(pruning.mask.any()):
            with ledger.stage("aftercare"):
                cared = care_for(
                    pruned, suspect, seen.images, seen.labels,
                    [contender.probe for contender in pruning.counted],
                    aftercare, config.aftercare, seed=scene.seed, ledger=ledger,
                )  # fmt: skip
                pruned = cared.model

    prefix = "" if preprocess is None else "1."
    report = repair_report(scene, shift, evidence, pruning, right, cared, told, prefix)
    finding = evidence.verdict.finding
    cut = partial(compacted, pruned, trace, pruning.mask, preprocess)
    return Result(unwrapped(pruned, preprocess), pruning.mask, finding, report, cut)


def compacted(
    pruned: nn.Module, trace: Trace, mask: Tensor, preprocess: Preprocess | None
) -> tuple[nn.Module, int]:
    """A smaller network with the same logits, and how many pruned sites it still has."""
    smaller, stayed = remove_mask(pruned, trace, mask)
    return unwrapped(smaller, preprocess), stayed


class _Story(ModuleType):
    """Python binds ``onp.sanitize`` to this module once it is imported: let it be called too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return sanitize(*args, **kwargs)


sys.modules[__name__].__class__ = _Story
