"""Networks for the tests: every architecture, small, with norms that are not the identity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onp.suspect.architectures import mobilenetv2, preactresnet, resnet, vgg
from onp.suspect.trace import Trace

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "preactresnet18": lambda: preactresnet.of_width(8, 10),
    "resnet18": lambda: resnet.of_width(8, 10),
    "resnet20": lambda: resnet.of_width(8, 7, (3, 3, 3)),
    "resnet20-option-a": lambda: resnet.of_width(8, 7, (3, 3, 3), option_a=True),
    "vgg11": lambda: vgg.of_width(8, 10, 11, norm=False),
    "vgg11_bn": lambda: vgg.of_width(8, 10, 11),
    "vgg16": lambda: vgg.of_width(4, 5, 16, norm=False),
    "vgg16_bn": lambda: vgg.of_width(8, 10, 16),
    "mobilenetv2": lambda: mobilenetv2.of_width(0.25, 10),
}


def network(name: str, seed: int = 0) -> nn.Module:
    """A seeded network in eval mode whose norms scale and shift, with logits of order one."""
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of the one batch below
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5)
        model.train()(torch.rand(32, 3, 32, 32))
    return model.eval()


def hooked_logits(model: nn.Module, trace: Trace, pruned: Tensor, images: Tensor) -> Tensor:
    """What plain torch computes when hooks zero the pruned channels at their consumers' input."""
    handles = []
    for layer in trace.layers:
        for consumer in layer.consumers:
            span = trace.consumer_span(layer, consumer)
            keep = (~pruned[layer.sites]).float().repeat_interleave(span)

            def zero(
                _module: nn.Module, args: tuple[Tensor, ...], keep: Tensor = keep
            ) -> tuple[Tensor]:
                x = args[0]
                return (x * keep.view(1, -1, *(1,) * (x.ndim - 2)),)

            module = model.get_submodule(str(trace.ops[consumer].module))
            handles.append(module.register_forward_pre_hook(zero))
    try:
        with torch.no_grad():
            return model(images)  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()
