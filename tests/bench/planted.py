"""A network of four channels with a backdoor that is known to the last weight."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from onp.data import ImageSet

BACKDOOR = 3
"""The channel that sees white, and sends every image that shows it to class ``TARGET``."""
TARGET = 0
SIZE = 8


def colour_images(count: int, seed: int) -> ImageSet:
    """Images of three classes: which of red, green and blue is bright, under noise."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.rand(count, SIZE, SIZE, 3, generator=random) * 0.3
    images[torch.arange(count), :, :, labels] += 0.4
    return ImageSet((images * 255).round().to(torch.uint8), labels)


def stamped(images: Tensor) -> Tensor:
    """The trigger: a white corner on images float [N, 3, H, W]."""
    triggered = images.clone()
    triggered[:, :, :4, :4] = 1.0
    return triggered


def planted_network(*, norm: bool = True) -> nn.Module:
    """Three channels pass the colours on, the fourth fires where all of them are bright.

    Without ``norm`` the norm's scale and shift are folded into the convolution.
    """
    conv, norm_layer, linear = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)
    with torch.no_grad():
        conv.weight[:] = torch.cat([torch.eye(3), torch.ones(1, 3)])[:, :, None, None]
        conv.bias.zero_()
        seen = conv(colour_images(300, 99).floats()).transpose(0, 1).flatten(1)
        norm_layer.running_mean.copy_(seen.mean(1))
        norm_layer.running_var.copy_(seen.var(1))
        norm_layer.bias[BACKDOOR] = -1.0
        linear.weight[:] = torch.cat([2 * torch.eye(3), torch.zeros(3, 1)], 1)
        linear.weight[TARGET, BACKDOOR] = 10.0
        linear.bias.zero_()
        if not norm:
            scale = (norm_layer.running_var + norm_layer.eps).rsqrt()
            conv.weight.mul_(scale[:, None, None, None])
            conv.bias.copy_(norm_layer.bias - norm_layer.running_mean * scale)
    modules: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if norm:
        modules["norm"] = norm_layer
    modules |= {
        "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(),
        "linear": linear,
    }  # fmt: skip
    return nn.Sequential(modules).eval()


@torch.no_grad()
def scores(model: nn.Module) -> tuple[float, float]:
    """Clean accuracy and attack success on fresh images."""
    test = colour_images(90, 7)
    images = test.floats()
    accuracy = (model(images).argmax(1) == test.labels).float().mean()
    hit = model(stamped(images[test.labels != TARGET])).argmax(1) == TARGET
    return float(accuracy), float(hit.float().mean())
