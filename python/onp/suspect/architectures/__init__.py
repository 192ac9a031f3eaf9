"""The networks that onp knows by name, each built to fit the weights it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from onp.errors import UsageError
from onp.suspect.matching import load_by_name

from . import convnext, densenet, mobilenetv2, mobilenetv3, preactresnet, resnet, vgg, vit
from .shapes import Shapes

_BUILDERS: dict[str, Callable[[Shapes], nn.Module]] = {
    "preactresnet18": preactresnet.from_shapes,
    "resnet18": resnet.from_shapes,
    "resnet20": resnet.from_shapes,
    "vgg11": vgg.from_shapes,
    "vgg11_bn": vgg.from_shapes,
    "vgg16": vgg.from_shapes,
    "vgg16_bn": vgg.from_shapes,
    "mobilenetv2": mobilenetv2.from_shapes,
    "mobilenetv3": mobilenetv3.from_shapes,
    "mobilenetv3_cifar": mobilenetv3.cifar_from_shapes,
    "densenet": densenet.from_shapes,
    "vit": vit.from_shapes,
    "convnext": convnext.from_shapes,
}

NAMES = tuple(_BUILDERS)
"""Names that ``build`` takes; width, depth and class count come from the weights."""


def build(arch: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The network ``arch`` in eval mode, as wide and deep as the weights, which are loaded by name.

    Raises UsageError for an unknown name and UnsafeOrCorruptModel where the weights do not fit.
    """
    check_name(arch)
    model = _BUILDERS[arch](Shapes(arch, state_dict))
    load_by_name(model, state_dict)
    return model.eval()


def check_name(arch: str) -> None:
    """Raise UsageError unless ``arch`` is one of ``NAMES``."""
    if arch not in _BUILDERS:
        raise UsageError(f"unknown architecture {arch!r}; --arch takes one of {', '.join(NAMES)}")
