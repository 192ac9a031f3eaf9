"""What comes in, checked before any work is done on it, and the scene that is worked on."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from onp.arguments import checked_device, checked_range, checked_seed
from onp.clean import Clean
from onp.config import Config
from onp.data import (
    PRESETS,
    ImageSet,
    Preprocess,
    check_class_names,
    check_labels,
    gather,
    spread_order,
)
from onp.errors import BadData, UnsafeOrCorruptModel, UntraceableModel, UsageError
from onp.evaluate import Backend, MaskEvaluator
from onp.ledger import Ledger
from onp.probes.responses import activations
from onp.scene import RESPONSE_IMAGES, Scene
from onp.suspect.surgery import check_writable
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
    seed = checked_seed(seed)
    if not isinstance(preprocess, Preprocess | None):
        raise UsageError(f"preprocess must be an onp.Preprocess or None, got {preprocess!r}")
    input_range = checked_range(input_range)
    images, labels = clean_images(clean, input_range, seed)
    suspect, where = frozen_copy(model, preprocess, device)
    trace = trace_network(suspect, (images.shape[1], images.shape[2], images.shape[3]))
    if isinstance(clean, ImageSet):
        check_class_names(clean, trace.num_classes)
    check_writable(suspect, trace)
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


def frozen_copy(
    model: nn.Module, preprocess: Preprocess | None, device: str | torch.device | None
) -> tuple[nn.Module, torch.device]:
    """A float32 copy in eval mode on the device, with the normalisation in front; without what
    only says how the network is run (``DataParallel``, ``torch.compile``)."""
    model = bare(model)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UnsafeOrCorruptModel("the model has no parameters")
    chosen = parameter.device if device is None else checked_device(device)
    try:
        suspect = copy.deepcopy(model).float()
    except RuntimeError as error:  # such as the hooks of torch.nn.utils.prune and weight_norm
        raise UntraceableModel(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]} (take hooks "
            "off first, by torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove)"
        ) from error
    if preprocess is not None:
        suspect = nn.Sequential(preprocess.module(), suspect)
    return suspect.to(chosen).eval(), chosen


def bare(model: nn.Module) -> nn.Module:
    """The network itself. Raises UsageError for what is no module of Python code."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("a TorchScript module is compiled: pass the module that it was made of")
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model must be a torch.nn.Module, got {type(model).__name__}: load weights into "
            "one first"
        )
    return model


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
