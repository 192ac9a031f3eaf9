"""What the defences share: norms as prunable channels, batches, accuracy, tracing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from bench.defences.api import NotApplicable
from bench.zoo.training import TrainingConfig, augment
from onp.data import ImageSet
from onp.errors import UntraceableModel
from onp.ledger import Ledger
from onp.suspect.network import training_layout
from onp.suspect.trace import Trace
from onp.suspect.trace import trace as trace_network

FORWARD, ACTIVATION_GRADIENTS, WEIGHT_GRADIENTS = 1, 2, 3
"""Image-forwards of one image: forwards alone, and backwards through the activations (pixels, masks
and norms need no more), and to the weights of the convolutions as well."""

BATCH = 128
"""The batch of the authors of ANP and RNP; BackdoorBench takes 256."""

AUGMENTATION = TrainingConfig(crop_padding=4, flip=False)
"""Random crops only: some classes differ by their side alone, as traffic signs do."""

ACCURACY_LIMIT = 0.02
"""Clean accuracy (of 1) that a cut picked on clean data may cost; our choice. BackdoorBench allows
10 points of test accuracy, and picks by the true attack success besides. The clean images are among
those that the suspect was trained on, so a cut costs more on test images than here."""


@dataclass(frozen=True)
class NormLayer:
    """A batch norm whose channels can be pruned; units are numbered through the network."""

    name: str
    start: int
    channels: int

    @property
    def units(self) -> slice:
        return slice(self.start, self.start + self.channels)


Norm = nn.BatchNorm2d | nn.BatchNorm1d


def norm_layers(model: nn.Module) -> list[NormLayer]:
    """Every batch norm that has a scale, a shift and running statistics."""
    layers: list[NormLayer] = []
    start = 0
    for name, module in model.named_modules():
        if isinstance(module, Norm) and module.affine and module.track_running_stats:
            layers.append(NormLayer(name, start, module.num_features))
            start += module.num_features
    return layers


def norm_of(model: nn.Module, layer: NormLayer) -> Norm:
    module = model.get_submodule(layer.name)
    assert isinstance(module, Norm)
    return module


def require_norms(model: nn.Module, method: str) -> list[NormLayer]:
    """``norm_layers``; raises NotApplicable where there are none."""
    layers = norm_layers(model)
    if not layers:
        raise NotApplicable(f"{method} reads batch norms; {type(model).__name__} has none")
    return layers


@torch.no_grad()
def zero_norms(
    model: nn.Module, layers: list[NormLayer], pruned: Tensor, *, shift: bool
) -> nn.Module:
    """A copy of ``model`` with the scale, and with ``shift`` the shift, of units pruned (bool [U])
    set to zero."""
    repaired = copy.deepcopy(model).eval()
    for layer in layers:
        norm = norm_of(repaired, layer)
        cut = pruned[layer.units].to(norm.weight.device)
        norm.weight[cut] = 0
        if shift:
            norm.bias[cut] = 0
    return repaired


def traced(model: nn.Module, clean: ImageSet) -> Trace:
    """The trace of a model in eval mode on images of the clean set's size; raises NotApplicable."""
    _, height, width, channels = clean.images.shape
    try:
        return trace_network(model, (channels, height, width))
    except UntraceableModel as error:
        raise NotApplicable(f"the network cannot be traced: {error}") from error


def training_copy(model: nn.Module, *, weights: bool) -> nn.Module:
    """A copy in training mode, dropout off (its noise would draw on the global random state).

    weights: whether its parameters take gradients.
    """
    student = copy.deepcopy(model).requires_grad_(weights).train()
    for module in student.modules():
        if "Dropout" in type(module).__name__:
            module.eval()
    student.to(memory_format=training_layout(student))  # type: ignore[call-overload]
    return student


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def epoch_batches(
    clean: ImageSet, batch: int, random: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented images float32 [B, 3, H, W] and labels int64 [B], in batches of even
    size, at most ``batch``."""
    order = torch.randperm(len(clean), generator=random)
    for index in order.tensor_split(ceil(len(clean) / batch)):
        yield augment(clean.images[index], AUGMENTATION, random), clean.labels[index]


@torch.no_grad()
def logits_on(model: nn.Module, images: Tensor, ledger: Ledger, batch: int = 250) -> Tensor:
    """Logits float32 [N, K], on the CPU, of a model in eval mode on images [N, 3, H, W]."""
    device = device_of(model)
    parts = [model(part.to(device)).float().cpu() for part in images.split(batch)]
    ledger.count(FORWARD * len(images))
    return torch.cat(parts)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers float32 [...] from logits [..., N, K] and labels [N]."""
    return (logits.argmax(-1) == labels).float().mean(-1)
