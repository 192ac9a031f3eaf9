"""The zoo's kinds of network. Another is added here alone: any module that onp can trace."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bench.zoo.compact_transformer import CompactTransformer
from onp.suspect.architectures import (
    convnext,
    densenet,
    mobilenetv2,
    mobilenetv3,
    preactresnet,
    resnet,
    vgg,
    vit,
)

ARCHITECTURES: dict[str, Callable[[float, int], nn.Module]] = {
    "preactresnet18": lambda width, classes: preactresnet.of_width(int(width), classes),
    "preactresnet10": lambda w, classes: preactresnet.of_width(int(w), classes, (1, 1, 1, 1)),
    "resnet18": lambda width, classes: resnet.of_width(int(width), classes, (2, 2, 2, 2)),
    "resnet20": lambda width, classes: resnet.of_width(int(width), classes, (3, 3, 3)),
    "vgg16_bn": lambda width, classes: vgg.of_width(int(width), classes, 16),
    "vgg11_bn": lambda width, classes: vgg.of_width(int(width), classes, 11),
    "vgg11": lambda width, classes: vgg.of_width(int(width), classes, 11, norm=False),
    "mobilenetv2": mobilenetv2.of_width,
    "mobilenetv3": mobilenetv3.of_width,
    "densenet": lambda width, classes: densenet.of_width(int(width), classes),
    "vit": lambda width, classes: vit.of_width(int(width), classes),
    "cct": lambda width, classes: CompactTransformer(int(width), classes),
    "convnext": lambda width, classes: convnext.of_width(int(width), classes),
}
"""A fresh network, images [N, 3, 32, 32] to logits [N, K], from (width, classes); of the
MobileNets the width is a factor."""
