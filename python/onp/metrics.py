"""Clean accuracy, attack success and robust accuracy, with sample sizes and intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onp.data import ImageSet, Preprocess, check_class_names, check_labels
from onp.errors import BadData, UnsafeOrCorruptModel, UsageError


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval for a share ``right / count``."""
    if count == 0:
        return 0.0, 1.0
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    half = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def predict(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """Answers int64 [N] on images float32 [N, C, H, W]; raises where logits are not finite."""
    answers = [_logits(model, part).argmax(1) for part in images.split(batch)]
    return torch.cat(answers) if answers else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Finite logits [N, K] on the CPU of images float32 [N, C, H, W]."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        logits = model(images.to(device).contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadData(
            f"the network does not accept images of shape {tuple(images.shape[1:])}: {reason}"
        ) from error
    if not bool(logits.isfinite().all()):
        raise UnsafeOrCorruptModel("the network's logits are not finite on these images")
    return logits.cpu()


def score(
    model: nn.Module,
    dataset: ImageSet,
    trigger: Callable[[Tensor], Tensor] | None = None,
    target: int | None = None,
    preprocess: Preprocess | None = None,
) -> dict[str, Any]:
    """CA on all images; with a trigger also ASR and RA over the images of other classes.

    ASR: triggered images answered ``target``. RA: triggered images answered with their own label.
    Raises BadData where a label, and UsageError where the target, is none of the network's classes.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    network = nn.Sequential(preprocess.module().to(device), model) if preprocess else model
    network.eval()
    images, labels = dataset.floats(), dataset.labels
    classes = _logits(network, images[:1]).shape[1]
    check_class_names(dataset, classes)
    check_labels(labels, classes)
    if target is not None and not 0 <= target < classes:
        raise UsageError(f"target {target} is none of the network's classes, 0 to {classes - 1}")
    right = int((predict(network, images) == labels).sum())
    result: dict[str, Any] = {"images": len(labels)} | _rate("clean_accuracy", right, len(labels))
    if trigger is None or target is None:
        return result
    others = labels != target
    if not bool(others.any()):
        raise BadData(f"every image is of the target class {target}: ASR is undefined")
    answers = predict(network, trigger(images[others]))
    count = int(others.sum())
    result |= {"target": target, "triggered_images": count}
    result |= _rate("attack_success_rate", int((answers == target).sum()), count)
    result |= _rate("robust_accuracy", int((answers == labels[others]).sum()), count)
    return result


def _rate(name: str, right: int, count: int) -> dict[str, Any]:
    """A share and its 95% interval, as reports hold them."""
    bounds = [round(bound, 4) for bound in interval(right, count)]
    return {name: right / count if count else None, f"{name}_interval": bounds}
