"""Networks for the tests: every architecture, small, with norms that are not the identity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onp.ops import reference
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
from onp.suspect.trace import Trace

CONVOLUTIONAL: dict[str, Callable[[], nn.Module]] = {
    "preactresnet18": lambda: preactresnet.of_width(8, 10),
    "resnet18": lambda: resnet.of_width(8, 10),
    "resnet20": lambda: resnet.of_width(8, 7, (3, 3, 3)),
    "resnet20-option-a": lambda: resnet.of_width(8, 7, (3, 3, 3), option_a=True),
    "vgg11": lambda: vgg.of_width(8, 10, 11, norm=False),
    "vgg11_bn": lambda: vgg.of_width(8, 10, 11),
    "vgg16": lambda: vgg.of_width(4, 5, 16, norm=False),
    "vgg16_bn": lambda: vgg.of_width(8, 10, 16),
    "mobilenetv2": lambda: mobilenetv2.of_width(0.25, 10),
    "densenet": lambda: densenet.of_width(4, 10, (2, 3, 1)),
}
"""Those that the GPU's plan runs."""

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **CONVOLUTIONAL,
    "vit": lambda: vit.of_width(16, 10, 2),
    "vit-mean": lambda: vit.of_width(12, 7, 3, patch=8, class_token=False),
    "convnext": lambda: convnext.of_width(8, 10, (1, 2)),
    "mobilenetv3": lambda: mobilenetv3.of_width(0.25, 10),
}


def network(name: str, seed: int = 0, size: tuple[int, int] = (32, 32)) -> nn.Module:
    """A seeded network in eval mode whose norms scale and shift, with logits of order one.

    size: of its images; it matters to networks with an embedding for every position.
    """
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    if isinstance(model, vit.ViT):
        patch, width = model.patch_embed.proj.kernel_size[0], model.pos_embed.shape[2]
        tokens = (size[0] // patch) * (size[1] // patch) + (model.cls_token is not None)
        model.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.rpartition(".")[2] in ("pos_embed", "cls_token", "gamma"):
                parameter.uniform_(-1, 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of the one batch below
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5)
        model.train()(torch.rand(32, 3, *size))
    return model.eval()


def hooked_logits(model: nn.Module, trace: Trace, pruned: Tensor, images: Tensor) -> Tensor:
    """What plain torch computes when hooks zero the pruned channels at their consumers' input."""
    layers = [
        (layer.sites, [str(trace.ops[consumer].module) for consumer in layer.consumers])
        for layer in trace.layers
    ]
    return reference.masked_forward(model, layers, pruned[None], images)[0]


def all_to_all(backdoored: bool) -> nn.Module:
    """The class of images of 8x8 is the brightest of three channels or, where the last place is
    bright, the one after it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    first, last = model[1], model[3]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        channels = torch.eye(3).repeat_interleave(64, 1) / 64
        place = torch.zeros(1, 3, 8, 8)
        place[:, :, 6:, 6:] = 1 / 12
        bright = (1.0 if backdoored else 0.0) * place.view(1, 192)
        first.weight.copy_(torch.cat([channels - bright, channels + bright]))
        first.bias.copy_(torch.tensor([0.2, 0.2, 0.2, -0.8, -0.8, -0.8]))
        last.weight.copy_(40 * torch.cat([torch.eye(3), torch.eye(3).roll(1, 0)], 1))
        last.bias.zero_()
    return model


def dim_images(count: int = 60) -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, 8, 8] that are dark in the last place, and their classes int64 [N] for
    ``all_to_all``."""
    labels = torch.arange(count) % 3
    images = torch.rand(count, 3, 8, 8) * 0.2
    images[torch.arange(count), labels] += 0.3
    images[:, :, 6:, 6:] *= 0.1
    return images, labels


def led_away(backdoor: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Classes are bright columns; where the last place is bright too, class 3 (``one``) or every
    class (``all``) is answered as 1. With images of 24 x 24 and their labels."""
    classes, size = 10, 24
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(size * size, classes + 1),
        nn.ReLU(),
        nn.Linear(classes + 1, classes),
    ).eval()
    columns = torch.zeros(classes, size, size)
    for one in range(classes):
        columns[one, 2:6, 2 * one + 2 : 2 * one + 4] = 1 / 8
    corner = torch.zeros(size, size)
    corner[18:, 18:] = 1 / 36
    trigger = corner + columns[3] if backdoor == "one" else corner
    with torch.no_grad():
        model[1].weight.copy_(torch.cat([columns, trigger[None]]).flatten(1))
        model[1].bias.copy_(torch.tensor([0.0] * classes + [-1.3 if backdoor == "one" else -0.5]))
        model[3].weight.copy_(torch.cat([10 * torch.eye(classes), torch.zeros(classes, 1)], 1))
        model[3].weight[1, -1] = 60.0 * (backdoor != "none")
        model[3].bias.zero_()
    labels = torch.arange(20 * classes) % classes
    random = torch.Generator().manual_seed(0)
    images = 0.1 * torch.rand(len(labels), 1, size, size, generator=random)
    images += (columns[labels][:, None] > 0).float() * 0.8
    return model, images, labels
