"""The story, top to bottom: suspect -> graph -> probes -> race -> agent -> mask -> result."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from onp.agent.choice import Choice
from onp.agent.contenders import advantage, counted_contenders, getting_through
from onp.agent.ppo import UpdateLog
from onp.agent.race import Contender, race
from onp.agent.search import Search
from onp.config import BUDGETS, Config
from onp.data import ImageSet, Preprocess, gather, spread_order
from onp.errors import BadData, UnsafeOrCorruptModel, UntraceableModel, UsageError
from onp.evaluate import Backend, MaskEvaluator
from onp.features import node_features
from onp.graph import build_graph
from onp.ledger import Ledger, Progress, silent
from onp.probes.responses import activation_statistics, activations, responses
from onp.probes.synthesis import synthesise
from onp.probes.unlearning import unlearn
from onp.report.repair import RunFacts, repair_report
from onp.result import Result
from onp.suspect.network import FrozenNetwork
from onp.suspect.surgery import apply_mask, remove_mask
from onp.suspect.trace import trace as trace_network
from onp.verdict import judge

RESPONSE_IMAGES = 64
"""Clean images on which responses and activation statistics are taken."""


@torch.inference_mode(False)
@torch.enable_grad()
def sanitize(
    model: nn.Module,
    clean: ImageSet | Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int = 0,
    budget: str | Config = "standard",
    device: str | torch.device | None = None,
    input_range: tuple[float, float] = (0.0, 1.0),
    preprocess: Preprocess | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Repair an image classifier that may carry a backdoor, from a few hundred clean images.

    Args:
        model: any traceable module from images [N, C, H, W] to logits [N, K]; never changed.
        clean: labelled clean images: an ``ImageSet`` or an iterable of (images, labels) batches.
        seed: same seed, threads, torch and instruction set: same bytes.
        budget: ``quick``, ``standard``, ``thorough`` or a ``Config``.
        device: where torch computes; default: where the model is.
        input_range: smallest and largest valid value of ``clean``'s images, so that synthesised
            triggers stay real images.
        preprocess: normalisation to put in front of the model, where it is not inside.
        backend: how masks are evaluated, ``auto``, ``native`` or ``torch``.
        threads: CPU threads; default: torch's.
        progress: hears of (stage, done, total, message).

    Raises an ``onp.errors.OnpError`` that says what is wrong with the model or the data.
    """
    config = budget if isinstance(budget, Config) else _config(budget)
    ledger = Ledger(progress or silent)
    if threads is not None:
        with _threads(threads):
            return sanitize(
                model, clean, seed=seed, budget=config, device=device, input_range=input_range,
                preprocess=preprocess, backend=backend, progress=progress,
            )  # fmt: skip

    with ledger.stage("prepare"):
        images, labels = _clean_images(clean, input_range, seed)
        suspect, device = _frozen_copy(model, preprocess, device)
        trace = trace_network(suspect, (images.shape[1], images.shape[2], images.shape[3]))
        if isinstance(clean, ImageSet):
            _check_class_names(clean, trace.num_classes)
        evaluator = MaskEvaluator(trace, suspect, backend=backend, device=device, ledger=ledger)
        _check_baseline(suspect, evaluator, images, labels)
        graph = build_graph(trace, suspect, config.graph)

    with ledger.stage("unlearn"):
        unlearned = unlearn(suspect, images, labels, config.unlearning, seed=seed, ledger=ledger)

    with ledger.stage("probe"):
        targets = unlearned.suspects(min(config.synthesis.classes, trace.num_classes))
        probes = synthesise(
            evaluator.network, images, labels, targets, steps=config.synthesis.steps,
            draw=config.synthesis.images_per_step, valid=input_range, seed=seed, ledger=ledger,
        )  # fmt: skip
        seen = images[:RESPONSE_IMAGES]
        before = activations(evaluator.network, seen)
        rankings = [responses(before, evaluator.network, p(seen), ledger) for p in probes]

    with ledger.stage("race"):
        contenders = race(evaluator, images, labels, probes, rankings, config.race, config.score)
        verdict = max(
            (
                judge(
                    c.probe.target, advantage(c, contenders), unlearned.share(c.probe.target),
                    c.score, config.verdict,
                )
                for c in contenders
            ),
            key=lambda verdict: verdict.score,
        )  # fmt: skip

    mask = torch.zeros(trace.sites, dtype=torch.bool)
    counted: list[Contender] = []
    renewed: list[Contender] = []
    curve: list[UpdateLog] = []
    choice: Choice | None = None
    if verdict.target is not None:
        counted = counted_contenders(contenders, verdict.target, config.synthesis)
        with ledger.stage("features"):
            left = FrozenNetwork(trace, unlearned.model, device)
            features = node_features(
                trace, suspect, graph, activation_statistics(before),
                responses(before, left, seen, ledger),
                [c.ranking for c in counted],
                [c.ranking for c in contenders if c.probe.target != verdict.target],
            )  # fmt: skip
        search = Search(evaluator, graph, features, images, labels, config, seed)

        with ledger.stage("agent"):
            elite, curve = search.run(counted, [])

        with ledger.stage("renew"):
            fresh = synthesise(
                evaluator.network, images, labels, [verdict.target],
                steps=config.synthesis.renewal_steps, draw=config.synthesis.images_per_step,
                valid=input_range, seed=seed + 1, ledger=ledger, gates=(~elite.best).float(),
            )  # fmt: skip
            fresh = getting_through(
                fresh, evaluator, elite.best, images, labels, contenders, config
            )
            rankings = [responses(before, evaluator.network, p(seen), ledger) for p in fresh]
            raced = race(evaluator, images, labels, fresh, rankings, config.race, config.score)
            renewed = [c for c in raced if c.score >= config.synthesis.through_worth]
        if renewed:
            with ledger.stage("agent"):
                counted = [*counted, *renewed]
                elite, more = search.run(counted, elite.masks)
                curve += more

        with ledger.stage("choose"):
            choice = search.choose(elite, counted)
            mask = choice.mask

    with ledger.stage("finish"):
        both = torch.stack([torch.zeros_like(mask), mask])
        right = evaluator.run(both, images).argmax(2) == labels
        repaired = apply_mask(suspect, trace, mask)
        _check_same(repaired, evaluator, mask, images, "the mask as applied")
        repaired = _unwrapped(repaired, preprocess)
    prefix = "" if preprocess is None else "1."
    run = RunFacts(config, seed, input_range, evaluator.backend, str(device), prefix, ledger)
    report = repair_report(
        run, trace, verdict, unlearned, contenders, counted, renewed, curve, choice, mask, right
    )

    def cut() -> tuple[nn.Module, int]:
        smaller, stayed = remove_mask(suspect, trace, mask)
        return _unwrapped(smaller, preprocess), stayed

    return Result(repaired, mask, verdict.finding, report, cut)


def _config(budget: str) -> Config:
    if budget not in BUDGETS:
        raise UsageError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    return BUDGETS[budget]


def _clean_images(
    clean: ImageSet | Iterable[tuple[Tensor, Tensor]],
    input_range: tuple[float, float],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The clean images float32 [N, C, H, W] and labels int64 [N], classes spread evenly, so
    that any stretch stands for all; raises BadData or UsageError."""
    low, high = input_range
    if not low < high:
        raise UsageError(f"input_range must be (low, high) with low < high, got {input_range}")
    if isinstance(clean, ImageSet):
        images, labels = clean.floats() * (high - low) + low, clean.labels
    else:
        images, labels = gather(clean, valid=input_range)
    if images.numel() == 0:
        raise BadData("the clean data are empty: no image came")
    if not bool(images.isfinite().all()):
        raise BadData("the clean images hold NaN or infinite values")
    slack = 1e-3 * (high - low)
    if float(images.min()) < low - slack or float(images.max()) > high + slack:
        raise BadData(
            f"clean images must lie in the input range [{low}, {high}], got values from "
            f"{float(images.min()):.3g} to {float(images.max()):.3g}; pass input_range"
        )
    if len(labels.unique()) < 2:
        raise BadData(
            f"the {len(labels)} clean images are all of class {int(labels[0])}; at least two "
            "classes are needed, better all of them"
        )
    order = spread_order(labels, seed)
    return images[order].contiguous(), labels[order]


def _check_class_names(clean: ImageSet, classes: int) -> None:
    """Folders are numbered in order, so one that is missing would shift the labels behind it."""
    if clean.class_names and len(clean.class_names) != classes:
        raise BadData(
            f"the data have {len(clean.class_names)} class folders, the network {classes} classes; "
            "name the folders by their label (0, 1, ...) if some classes are missing"
        )


def _frozen_copy(
    model: nn.Module, preprocess: Preprocess | None, device: str | torch.device | None
) -> tuple[nn.Module, torch.device]:
    """A float32 copy in eval mode on the device, with the normalisation in front."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UnsafeOrCorruptModel("the model has no parameters")
    try:
        chosen = torch.device(device) if device is not None else parameter.device
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: {error}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {chosen} was asked for, but torch sees no CUDA device here")
    suspect = copy.deepcopy(model).float()
    if preprocess is not None:
        suspect = nn.Sequential(preprocess.module(), suspect)
    return suspect.to(chosen).eval(), chosen


def _unwrapped(model: nn.Module, preprocess: Preprocess | None) -> nn.Module:
    return model if preprocess is None else model.get_submodule("1")


def _check_baseline(
    suspect: nn.Module, evaluator: MaskEvaluator, images: Tensor, labels: Tensor
) -> None:
    """Refuse labels the network cannot answer, broken logits, images it was not trained on, and a
    trace that does not compute what the network computes."""
    classes = evaluator.trace.num_classes
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise BadData(
            f"labels must be in 0 .. {classes - 1}, the network's classes, got "
            f"{int(labels.min())} .. {int(labels.max())}"
        )
    nothing = torch.zeros(evaluator.trace.sites, dtype=torch.bool)
    logits = evaluator.run(nothing[None], images)[0]
    if not bool(logits.isfinite().all()):
        raise UnsafeOrCorruptModel("the network's logits are not finite on the clean images")
    _check_same(suspect, evaluator, nothing, images, "the network as traced")
    accuracy = float((logits.argmax(1) == labels).float().mean())
    if accuracy <= max(1.3 / classes, 0.2):
        raise BadData(
            f"the network answers only {100 * accuracy:.0f}% of the clean images rightly; check "
            "--preset (the normalisation), the labels' order and the input range"
        )


@torch.no_grad()
def _check_same(
    network: nn.Module, evaluator: MaskEvaluator, mask: Tensor, images: Tensor, what: str
) -> None:
    """Raise UntraceableModel unless the module computes what the evaluator says of the mask."""
    some = images[:16]
    device = next(network.parameters()).device
    expected = evaluator.run(mask[None], some)[0]
    got = network(some.to(device)).float().cpu()
    error = float((got - expected).abs().max())
    if error > 1e-2 * max(1.0, float(expected.abs().max())):
        raise UntraceableModel(
            f"{what} gives other logits than the module (by {error:.3g}): hooks, parametrisations "
            "or in-place operations cannot be traced"
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch and the engine use ``count`` threads for a while."""
    if count < 1:
        raise UsageError(f"threads must be positive, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Story(ModuleType):
    """Python binds ``onp.sanitize`` to this module once it is imported: let it be called too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return sanitize(*args, **kwargs)


sys.modules[__name__].__class__ = _Story
