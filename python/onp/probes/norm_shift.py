"""What the batch norms remember of training that the clean images do not bear out.

A batch norm's running statistics average over the training images, poisoned ones included. So for a
share p of triggered images, in every channel and for the first and the second moment alike,

    remembered moment - clean moment = p * (triggered moment - clean moment)

The shift of the moments tells, up to p and noise, what the trigger does to every channel: an image
of the trigger inside the network, from clean data alone. The two together also tell p: twice the
effect on half of the images moves the first moment alike, the second one twice as far. That running
statistics expose backdoors is BNP's observation (Zheng et al., "Pre-activation Distributions Expose
Backdoor Neurons", NeurIPS 2022), which ranks channels by it; reading the moments as the trigger's
own response, cleared of what else moves them, is ours.

What else moves them: training images are cropped and mirrored, and classes may come in other shares
than in the clean images. These are directions that can be measured, so they are fitted and
taken out (ridge regression). What is left is compared with what random halves of the clean images
show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.ledger import Ledger
from onp.probes.families import Range
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import Trace

TRAINING_BATCH = 128
"""Assumed. A running mean of momentum m has the noise of a mean over (2 - m) / m batches."""
LONG = 100
"""Batches behind a running statistic from which on it remembers a network that was another one
(a momentum below .02; .1, which is usual, has 19)."""
LEAST_FREEDOM = 0.05
"""Of the clean images' noise that class means must leave for a shift to be told from chance."""
LEAST_NOISE = 1e-4
"""In deviations of the norm's output; below this a channel is as good as constant."""
RIDGE = 1e-2
"""Of the class directions, in units of their mean square; augmentations get a hundredth of it."""
HALVINGS = 8
"""Random halves of the clean images that say how large a shift is by chance."""
CROPS = (16, 8)
"""Training images may be cropped from themselves padded by a sixteenth or an eighth (2 or 4 pixels
of 32): the black borders move the means otherwise for each."""
BATCH = 250


class NormMoments:
    """Mean and mean square of every batch-norm channel, standardised by the running statistics: 0
    over the training images (the mean square is counted from what it was there)."""

    def __init__(self, network: FrozenNetwork, model: nn.Module) -> None:
        self.network = network
        self.at: dict[int, slice] = {}
        """Channels of each norm's op index."""
        scales, offsets, squares, memories = [], [], [], []
        start = 0
        for index, op in enumerate(network.trace.ops):
            if op.kind != "norm":
                continue
            norm = model.get_submodule(str(op.module))
            assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d)
            count = norm.num_features
            ones = torch.ones(count)
            scales.append(ones if norm.weight is None else norm.weight.detach().float().cpu())
            offsets.append(0 * ones if norm.bias is None else norm.bias.detach().float().cpu())
            assert norm.running_var is not None
            variance = norm.running_var.detach().float().cpu()
            squares.append(variance / (variance + norm.eps))
            momentum = norm.momentum or 1e-6  # None: the mean of all batches
            memories.append((2 - momentum) / momentum)
            self.at[index] = slice(start, start + count)
            start += count
        self.scale = torch.cat(scales) if scales else torch.empty(0)
        self.offset = torch.cat(offsets) if offsets else torch.empty(0)
        self.square = torch.cat(squares) if squares else torch.empty(0)
        """float32 [U]: mean square over the training images, 1 but for the norm's epsilon."""
        self.remembered = TRAINING_BATCH * min(memories, default=0.0)
        """Training images behind a running statistic, as far as its noise goes."""
        self.live = self.scale.abs() > 1e-3 * self.scale.abs().amax() if scales else self.scale > 0
        """bool [U]: channels that the norm lets through at all."""
        self._there: tuple[Tensor, ...] | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, K] and moments [N, 2U] of images [N, C, H, W], all first ones before the
        second; keeps gradients."""
        logits, mean, variance = self.network.with_moments(images)
        live, offset, square, scale = self._on(mean.device)
        first = (mean - offset) / scale
        second = variance / scale.square() + first.square() - square
        return logits, torch.cat([first * live, second * live], 1)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """``live``, ``offset``, ``square`` and the scale to divide by, on a device."""
        if self._there is None or self._there[0].device != device:
            scale = torch.where(self.live, self.scale, torch.ones_like(self.scale))
            parts = (self.live, self.offset, self.square, scale)
            self._there = tuple(part.to(device) for part in parts)
        return self._there


@dataclass(frozen=True, eq=False)
class NormShift:
    """The shift of both moments of U batch-norm channels, in units of its noise, without what is
    explained."""

    moments: NormMoments
    clean: Tensor
    """float32 [N, 2U]: moments of each clean image."""
    noise: Tensor
    """float32 [2U]: standard error of the shift."""
    nuisances: Tensor
    """float32 [Q, 2U]: directions of class shares and augmentations, in units of the noise."""
    solver: Tensor
    """float32 [Q, Q]: inverse of the ridge regression's normal matrix."""
    residual: Tensor
    """float32 [2U]: the shift, in units of the noise, nuisances taken out."""
    excess: float
    """Root mean square of the residual over what random halves of the clean images and the fitted
    class shares would have: 1 is chance."""

    @property
    def long(self) -> bool:
        """Whether the norms remember so many batches that the network moved meanwhile."""
        return self.moments.remembered >= LONG * TRAINING_BATCH

    def to(self, device: torch.device) -> NormShift:
        """On a device."""
        return replace(
            self, clean=self.clean.to(device), noise=self.noise.to(device),
            nuisances=self.nuisances.to(device), solver=self.solver.to(device),
            residual=self.residual.to(device),
        )  # fmt: skip

    def explained(self, change: Tensor) -> Tensor:
        """A change of the moments float32 [2U] in the residual's terms; keeps gradients."""
        scaled = change / self.noise
        weights = self.solver @ (self.nuisances @ scaled)
        return scaled - weights @ self.nuisances


@torch.no_grad()
def norm_shift(
    network: FrozenNetwork,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    valid: Range,
    seed: int,
    ledger: Ledger,
) -> NormShift | None:
    """Measure the shift on clean images float32 [N, C, H, W] with labels int64 [N]; None for a
    network without batch norms and for too few images a class. Costs 4 image-forwards an image."""
    moments = NormMoments(network, model)
    count, present = len(images), F.one_hot(labels)[:, labels.unique()].float()  # [N, K]
    freedom = 1 - (present.shape[1] - 1) / max(count - 1, 1)
    if not moments.at or freedom < LEAST_FREEDOM:
        return None
    random = torch.Generator().manual_seed(seed)

    def measured(pixels: Tensor) -> Tensor:
        ledger.count(len(pixels))
        return torch.cat([moments(part)[1].cpu() for part in pixels.split(BATCH)])

    clean = measured(images)
    augmented = [
        measured(images.flip(3)),
        *(measured(shifted_at_random(images, valid[0], part, random)) for part in CROPS),
    ]
    error = (1 / count + 1 / moments.remembered) ** 0.5
    noise = (augmented[-1].std(0) * error).clamp_min(LEAST_NOISE)
    augmentations = torch.stack([(other - clean).mean(0) for other in augmented])
    classes = present.T @ clean / present.sum(0)[:, None]
    classes = classes - classes.mean(0)
    nuisances = torch.cat([classes, augmentations]) / noise
    normal = nuisances @ nuisances.T
    ridge = torch.full((len(normal),), RIDGE * float(normal.diagonal()[: len(classes)].mean()))
    ridge[len(classes) :] *= 0.01
    solver = torch.linalg.inv(normal.double() + ridge.clamp_min(1e-6).diag().double()).float()
    shift = NormShift(moments, clean, noise, nuisances, solver, torch.empty(0), 0.0)
    residual = shift.explained(-clean.mean(0))
    # Fitted class shares weigh the clean images unevenly, which makes their mean noisier.
    weights = solver @ (nuisances @ (-clean.mean(0) / noise))
    present /= present.sum(0)
    each = (1 / count + present @ weights[: len(classes)]).square().sum()
    uneven = float((each + 1 / moments.remembered).sqrt()) / error
    chance = []
    for _ in range(HALVINGS):
        order = torch.randperm(count, generator=random)
        one, other = clean[order[: count // 2]].mean(0), clean[order[count // 2 :]].mean(0)
        chance.append(rms(shift.explained((one - other) * error / (2 * count**-0.5))))
    # A half's noise lies partly along the class means, which are taken out of it but not of the
    # whole: its classes weigh alike.
    excess = rms(residual) * freedom**0.5 / max(uneven * sum(chance) / len(chance), 1e-12)
    return NormShift(moments, clean, noise, nuisances, solver, residual, excess)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def shifted_at_random(images: Tensor, fill: float, part: int, random: torch.Generator) -> Tensor:
    """Images [N, C, H, W], each cropped at random from itself padded by H / part."""
    count, channels, height, width = images.shape
    pad = max(height // part, 1)
    padded = F.pad(images, (pad,) * 4, value=fill)
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=random)
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=random)
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    each = torch.arange(count)[:, None, None, None]
    return padded[each, torch.arange(channels)[None, :, None, None], rows, columns]


def by_site(shift: NormShift | None, trace: Trace) -> Tensor:
    """The residual of each site's own norm, both moments together, float32 [S]; 0 where it has
    none."""
    values = torch.zeros(trace.sites)
    if shift is None:
        return values
    channels = torch.stack(shift.residual.chunk(2)).norm(dim=0)
    for layer in trace.layers:
        if layer.norm in shift.moments.at:
            values[layer.sites] = channels[shift.moments.at[layer.norm]]
    return values
