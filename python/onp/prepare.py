"""What comes in, checked before any work is done on it, and the scene that is worked on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import index
from typing import SupportsIndex, get_args

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from onp.clean import Clean
from onp.config import BUDGETS, Config, SearchPrecision
from onp.data import PRESETS, ImageSet, Preprocess, check_labels, gather, spread_order
from onp.errors import BadData, UnsafeOrCorruptModel, UntraceableModel, UsageError
from onp.evaluate import Backend, MaskEvaluator
from onp.ledger import Ledger
from onp.probes.responses import activations
from onp.scene import RESPONSE_IMAGES, Scene
from onp.suspect.trace import trace as trace_network

PIXELS = (0.0, 1.0)
"""The input range of images that are not normalised."""
SURE = 0.9
"""A network that answers so many of the clean images rightly sees them as it was trained to;"""
NORMALISED = 64
"""else as many are shown to it behind the other usual normalisations,"""
BETTER = 10
"""and one that makes so many more of these answers right is nearer to its own. (Behind the wrong
one, networks of CIFAR-10 answer .27 to .37 rightly instead of .71 to .84.)"""


def config_of(budget: str | Config) -> Config:
    """The configuration that a budget names, or is; raises UsageError for one that is none."""
    if isinstance(budget, str):
        if budget not in BUDGETS:
            raise UsageError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
        return BUDGETS[budget]
    if budget.search_precision not in get_args(SearchPrecision):
        raise UsageError(
            f"search_precision must be one of {', '.join(get_args(SearchPrecision))}, "
            f"got {budget.search_precision!r}"
        )
    return budget


def opened(
    model: nn.Module,
    clean: ImageSet | Iterable[tuple[Tensor, Tensor]],
    config: Config,
    *,
    seed: int,
    ledger: Ledger,
    device: str | torch.device | None = None,
    input_range: tuple[float, float] = PIXELS,
    preprocess: Preprocess | None = None,
    backend: Backend = "auto",
) -> Scene:
    """The suspect, copied and traced, and the clean images, all checked: what a repair works on.
    Arguments are those of ``onp.sanitize``."""
    images, labels = clean_images(clean, input_range, seed)
    suspect, where = frozen_copy(model, preprocess, device)
    trace = trace_network(suspect, (images.shape[1], images.shape[2], images.shape[3]))
    if isinstance(clean, ImageSet):
        check_class_names(clean, trace.num_classes)
    evaluator = MaskEvaluator(trace, suspect, backend=backend, device=where, ledger=ledger)
    seen = baseline(
        suspect, evaluator, images, labels, preprocess=preprocess, input_range=input_range
    )
    before = activations(evaluator.network, images[:RESPONSE_IMAGES])
    return Scene(suspect, evaluator, seen, before, config, input_range, seed)


def clean_images(
    clean: ImageSet | Iterable[tuple[Tensor, Tensor]],
    input_range: tuple[float, float],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The clean images float32 [N, C, H, W] and labels int64 [N], classes spread evenly, so
    that any stretch stands for all; raises BadData or UsageError."""
    low, high = input_range
    if not -math.inf < low < high < math.inf:
        raise UsageError(
            f"input_range must be (low, high), finite, with low < high, got {input_range}"
        )
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


def check_class_names(clean: ImageSet, classes: int) -> None:
    """Folders are numbered in order, so one that is missing would shift the labels behind it."""
    if clean.class_names and len(clean.class_names) != classes:
        raise BadData(
            f"the data have {len(clean.class_names)} class folders, the network {classes} classes; "
            "name the folders by their label (0, 1, ...) if some classes are missing"
        )


def checked_target(target: SupportsIndex | None, labels: Tensor, classes: int) -> int | None:
    """The class that is named. Raises UsageError where it is none of the network's, and BadData
    where none of the ``labels`` int64 [N] is of it: what pruning costs it could not be seen."""
    if target is None:
        return None
    try:
        number = index(target)
    except TypeError:
        number = -1
    if isinstance(target, bool) or not 0 <= number < classes:
        raise UsageError(f"target {target} is none of the network's classes, 0 to {classes - 1}")
    if not bool((labels == number).any()):
        raise BadData(f"no clean image is of class {number}, the target that was named")
    return number


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises UsageError where torch cannot compute on it. Of a GPU only
    the presence is looked at: a process that leaves it to others should hold no memory there."""
    try:
        chosen = torch.device(device)
        if chosen.type != "cuda":
            torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"device {device} cannot be used: {first_line}") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {chosen} was asked for, but torch sees no CUDA device here")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"device {chosen} was asked for, but torch sees {torch.cuda.device_count()} here, "
                "numbered from 0"
            )
    return chosen


def frozen_copy(
    model: nn.Module, preprocess: Preprocess | None, device: str | torch.device | None
) -> tuple[nn.Module, torch.device]:
    """A float32 copy in eval mode on the device, with the normalisation in front."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UnsafeOrCorruptModel("the model has no parameters")
    chosen = parameter.device if device is None else checked_device(device)
    suspect = copy.deepcopy(model).float()
    if preprocess is not None:
        suspect = nn.Sequential(preprocess.module(), suspect)
    return suspect.to(chosen).eval(), chosen


def unwrapped(model: nn.Module, preprocess: Preprocess | None) -> nn.Module:
    return model if preprocess is None else model.get_submodule("1")


def baseline(
    suspect: nn.Module,
    evaluator: MaskEvaluator,
    images: Tensor,
    labels: Tensor,
    *,
    preprocess: Preprocess | None = None,
    input_range: tuple[float, float] = PIXELS,
) -> Clean:
    """What the network, with ``preprocess`` in it, says of the clean images. Refuses labels the
    network cannot answer, broken logits, images it was not trained on, or not like this, and a
    trace that does not compute what the network computes."""
    classes = evaluator.trace.num_classes
    check_labels(labels, classes)
    nothing = torch.zeros(evaluator.trace.sites, dtype=torch.bool)
    clean = Clean.seen_by(evaluator, images, labels)
    if not bool(clean.original.isfinite().all()):
        raise UnsafeOrCorruptModel("the network's logits are not finite on the clean images")
    check_same(suspect, evaluator, nothing, images, "the network as traced")
    accuracy = float((clean.answers == labels).float().mean())
    pixels = tuple(map(float, input_range)) == PIXELS and images.shape[1] == 3
    if accuracy < SURE and pixels and len(labels) > BETTER:
        check_normalisation(suspect, preprocess, clean, evaluator.ledger)
    if accuracy <= max(1.3 / classes, 0.2):
        raise BadData(
            f"the network answers only {100 * accuracy:.0f}% of the clean images rightly; check "
            "--preset (the normalisation), the labels' order and the input range"
        )
    return clean


@torch.no_grad()
def check_normalisation(
    suspect: nn.Module, preprocess: Preprocess | None, clean: Clean, ledger: Ledger
) -> None:
    """Raise BadData where another usual normalisation of pixels in [0, 1] makes far more answers
    right than ``preprocess``, which is in front of the suspect: what is found and pruned behind the
    wrong one means nothing. Costs ``NORMALISED`` image-forwards for each."""
    few = slice(NORMALISED)
    images, labels = clean.images[few], clean.labels[few]
    bare, device = unwrapped(suspect, preprocess), next(suspect.parameters()).device

    def right(other: Preprocess | None) -> int:
        shown = images if other is None else other.module()(images)
        ledger.count(len(images))
        return int((bare(shown.to(device)).argmax(1).cpu() == labels).sum())

    others = {each: name for name, each in PRESETS.items() if each != preprocess}
    known = {name: right(each) for each, name in others.items()}
    best = max(known, key=lambda name: known[name])
    told = int((clean.answers[few] == labels).sum())
    if known[best] >= told + BETTER:
        raise BadData(
            f"the network answers {100 * told / len(labels):.0f}% of the clean images rightly, and "
            f"{100 * known[best] / len(labels):.0f}% behind the normalisation {best!r}: take "
            f"--preset {best} (preprocess=onp.PRESETS[{best!r}]), or the one it was trained with"
        )


@torch.no_grad()
def check_same(
    network: nn.Module, evaluator: MaskEvaluator, mask: Tensor, images: Tensor, what: str
) -> None:
    """Raise UntraceableModel unless the module computes what the evaluator says of the mask."""
    some = images[:16]
    device = next(network.parameters()).device
    expected = evaluator.run(mask[None], some, exact=True)[0]
    with cudnn.flags(enabled=True, allow_tf32=False):
        got = network(some.to(device)).float().cpu()
    error = float((got - expected).abs().max())
    if error > 1e-2 * max(1.0, float(expected.abs().max())):
        raise UntraceableModel(
            f"{what} gives other logits than the module (by {error:.3g}): hooks, parametrisations "
            "or in-place operations cannot be traced"
        )


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch and the engine use ``count`` threads for a while; None: as many as they do."""
    if count is None:
        yield
        return
    if count < 1:
        raise UsageError(f"threads must be positive, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
