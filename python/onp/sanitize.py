"""The story, top to bottom: suspect -> graph -> evidence -> gates -> agent -> mask -> result."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from onp.aftercare import Aftercare, AftercareOutcome, care_for
from onp.agent.choice import Choice
from onp.agent.flips import Round
from onp.agent.race import Contender
from onp.config import Config
from onp.data import ImageSet, Preprocess
from onp.evaluate import Backend, MaskEvaluator
from onp.evidence import gather, measured_shift
from onp.graph import build_graph
from onp.ledger import Ledger, Progress, silent
from onp.prepare import (
    baseline,
    check_class_names,
    check_same,
    checked_target,
    clean_images,
    config_of,
    frozen_copy,
    torch_threads,
    unwrapped,
)
from onp.probes.norm_shift import by_site
from onp.probes.responses import activations
from onp.renewal import renew
from onp.report.repair import RunFacts, repair_report
from onp.result import Result
from onp.scene import RESPONSE_IMAGES, Scene
from onp.search import Search
from onp.suspect.surgery import apply_mask, remove_mask
from onp.suspect.trace import trace as trace_network


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
    if threads is not None:
        with torch_threads(threads):
            return sanitize(
                model, clean, seed=seed, budget=config, target=target, device=device,
                input_range=input_range, preprocess=preprocess, backend=backend,
                recalibrate=recalibrate, finetune=finetune, progress=progress,
            )  # fmt: skip

    with ledger.stage("prepare"):
        images, labels = clean_images(clean, input_range, seed)
        suspect, device = frozen_copy(model, preprocess, device)
        aftercare = Aftercare(recalibrate, finetune)
        aftercare.check(suspect)
        trace = trace_network(suspect, (images.shape[1], images.shape[2], images.shape[3]))
        if isinstance(clean, ImageSet):
            check_class_names(clean, trace.num_classes)
        told = checked_target(target, labels, trace.num_classes)
        evaluator = MaskEvaluator(trace, suspect, backend=backend, device=device, ledger=ledger)
        seen = baseline(
            suspect, evaluator, images, labels, preprocess=preprocess, input_range=input_range
        )
        graph = build_graph(trace, suspect, config.graph)

    with ledger.stage("statistics"):
        before = activations(evaluator.network, images[:RESPONSE_IMAGES])
        shift = measured_shift(evaluator, suspect, seen, config, valid=input_range, seed=seed)
    scene = Scene(suspect, evaluator, seen, before, config, input_range, seed)
    evidence = gather(scene, shift, told)

    mask = torch.zeros(trace.sites, dtype=torch.bool)
    counted = evidence.counted
    renewed: list[Contender] = []
    rounds: list[Round] = []
    choice: Choice | None = None
    if evidence.verdict.target is not None:
        search = Search(scene.with_copies(), graph, by_site(shift, trace), evidence)
        finalists, rounds = search.find(counted, [])
        with ledger.stage("renew"):
            renewed = renew(scene, evidence, finalists[0])
        if renewed:
            counted = [*counted, *renewed]
            finalists, more = search.find(counted, finalists)
            rounds = rounds + more
        with ledger.stage("choose"):
            choice = search.choose(finalists, counted)
            mask = choice.mask

    with ledger.stage("finish"):
        after = seen.answers
        if mask.any():
            after = evaluator.run(mask[None], images, exact=True)[0].argmax(1)
        right = torch.stack([seen.answers, after]) == labels
        pruned = apply_mask(suspect, trace, mask)
        check_same(pruned, evaluator, mask, images, "the mask as applied")
    cared: AftercareOutcome | None = None
    if aftercare and bool(mask.any()):
        with ledger.stage("aftercare"):
            cared = care_for(
                pruned, suspect, images, labels, [contender.probe for contender in counted],
                aftercare, config.aftercare, seed=seed, ledger=ledger,
            )  # fmt: skip
            pruned = cared.model
    prefix = "" if preprocess is None else "1."
    run = RunFacts(
        config, seed, input_range, evaluator.backend, evaluator.precision, str(device), prefix,
        ledger, told,
    )  # fmt: skip
    report = repair_report(
        run, trace, shift, evidence, counted, renewed, rounds, choice, mask, right, cared
    )
    repaired = unwrapped(pruned, preprocess)

    def cut() -> tuple[nn.Module, int]:
        smaller, stayed = remove_mask(pruned, trace, mask)
        return unwrapped(smaller, preprocess), stayed

    return Result(repaired, mask, evidence.verdict.finding, report, cut)


class _Story(ModuleType):
    """Python binds ``onp.sanitize`` to this module once it is imported: let it be called too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return sanitize(*args, **kwargs)


sys.modules[__name__].__class__ = _Story
