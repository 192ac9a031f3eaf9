"""I-BAU: Implicit Backdoor Adversarial Unlearning (Zeng et al., ICLR 2022).

A minimax game in rounds: inside, one universal perturbation is found that changes the network's
answers; outside, the weights descend on the loss of perturbed images, through the perturbation's
own dependence on the weights (an implicit hypergradient, by fixed-point steps).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.defences.api import Info, NotApplicable, defence
from bench.defences.common import ACTIVATION_GRADIENTS, FORWARD, WEIGHT_GRADIENTS, device_of
from onp.data import ImageSet
from onp.ledger import Ledger

ROUNDS = 5
INNER_LEARNING_RATE = 10.0
PRICE = 0.001
"""Of the perturbation's squared norm."""
FIXED_POINT_STEPS = 5
FIXED_POINT_RATE = 0.1
"""Step of the descent whose fixed point the perturbation is."""
STAMPED = 0.01
"""Share of the images that are perturbed in the outer loss; of a small batch it is one image."""
LEARNING_RATE = 1e-4
"""Adam's. All of the above: BackdoorBench's ``i-bau``."""
BATCH = 50
PUBLISHED_BATCH, PUBLISHED_UPDATES = 256, 10
"""BackdoorBench on 5% of CIFAR-10: batches of 256 of 2,500 images, 10 updates a round; of 500, 50
leave as many."""

SECOND_ORDER = 2
"""Image-forwards of a Hessian-vector product: it goes back through the forward pass and through
the first backward pass."""
SECOND_ORDER_WITH_WEIGHTS = 4
"""The same with the gradients of the weights, in both passes."""


@defence("i-bau")
def implicit_unlearning(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    rounds: int = ROUNDS,
    learning_rate: float = LEARNING_RATE,
    batch: int = BATCH,
) -> tuple[nn.Module, Info]:
    """Unlearn universal perturbations in rounds; norms stay in eval mode."""
    random = torch.Generator().manual_seed(seed)
    repaired = copy.deepcopy(model).requires_grad_(True).eval()
    # Second derivatives run backwards through layers as narrow as an image has channels: see
    # onp.suspect.network.training_layout.
    repaired.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    weights = list(repaired.parameters())
    device = device_of(repaired)
    images, labels = clean.floats().to(device), clean.labels.to(device)
    optimizer = torch.optim.Adam(weights, learning_rate)
    chunks = ceil(len(clean) / batch)
    norms: list[float] = []
    perturbed = 0
    for number in range(rounds):
        delta = universal_perturbation(repaired, images, batch, random, ledger)
        norms.append(round(float(delta.norm()), 3))
        for step, index in enumerate(torch.randperm(len(clean), generator=random).split(batch)):
            stamped = stamped_places(len(index), random)
            perturbed += len(stamped)
            gradients = _outer_gradients(
                repaired, weights, delta, images[index], labels[index], stamped, ledger
            )
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
            ledger.tick(number * chunks + step + 1, rounds * chunks, "unlearning")
    share = perturbed / max(rounds * len(clean), 1)
    schedule = (
        f"{rounds} of {ROUNDS} rounds, {rounds * chunks} updates in batches of up to {batch} with "
        f"{share:.1%} of the images perturbed (on 5% of CIFAR-10: {ROUNDS * PUBLISHED_UPDATES} in "
        f"batches of {PUBLISHED_BATCH} with {STAMPED:.0%})"
    )
    settings = {"perturbation_norms": norms, "perturbed_share": round(share, 4)}
    return repaired, Info(schedule=schedule, settings=settings)


def universal_perturbation(
    model: nn.Module, images: Tensor, batch: int, random: torch.Generator, ledger: Ledger
) -> Tensor:
    """float [1, C, H, W], from zero by one pass over the images that raises the loss of the
    network's own answers."""
    delta = torch.zeros_like(images[:1])
    for index in torch.randperm(len(images), generator=random).split(batch):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(_inner_loss(model, images[index], delta), delta)
        delta = delta.detach() - INNER_LEARNING_RATE * gradient
        ledger.count((FORWARD + ACTIVATION_GRADIENTS) * len(index))
    return delta


def _inner_loss(model: nn.Module, images: Tensor, delta: Tensor) -> Tensor:
    with torch.no_grad():
        answers = model(images).argmax(1)
    return -F.cross_entropy(model(images + delta), answers) + PRICE * delta.square().sum()


def stamped_places(count: int, random: torch.Generator) -> Tensor:
    """Which of a batch's ``count`` images carry the perturbation, int64: the published share, at
    least one."""
    return torch.randperm(count, generator=random)[: max(1, round(STAMPED * count))]


def _outer_gradients(
    model: nn.Module,
    weights: Sequence[Tensor],
    delta: Tensor,
    images: Tensor,
    labels: Tensor,
    stamped: Tensor,
    ledger: Ledger,
) -> list[Tensor]:
    """Hypergradients of the loss on a batch whose images at the places ``stamped`` (int64) carry
    ``delta``."""
    carried = torch.zeros(len(images), 1, 1, 1, device=images.device)
    carried[stamped] = 1
    ledger.count(WEIGHT_GRADIENTS * len(images))  # the outer loss
    ledger.count((FORWARD + ACTIVATION_GRADIENTS) * len(images))  # answers and the inner gradient
    ledger.count(SECOND_ORDER * (FIXED_POINT_STEPS - 1) * len(images))
    ledger.count(SECOND_ORDER_WITH_WEIGHTS * len(images))
    return hypergradient(
        lambda d: F.cross_entropy(model(images + carried * d), labels),
        lambda d: _inner_loss(model, images, d),
        delta,
        weights,
    )


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    delta: Tensor,
    weights: Sequence[Tensor],
    *,
    steps: int = FIXED_POINT_STEPS,
    rate: float = FIXED_POINT_RATE,
) -> list[Tensor]:
    """The derivative of outer(delta*(w), w) by the weights, where delta* minimises inner(., w).

    outer, inner: scalars of the perturbation that also depend on ``weights``. With the descent
    map P(d, w) = d - rate * (d inner / d d), the derivative is
    (d outer / d w) + (dP/dw)^T v, where v = (dP/dd)^T v + d outer / d d. v is found by ``steps``
    iterations from zero (Grazzi et al., ICML 2020, fixed-point method; the paper's section 4).
    Returns one tensor a weight, of its shape; raises NotApplicable where torch has no second
    derivative of an operation.
    """
    delta = delta.detach().requires_grad_(True)
    by_delta, *direct = torch.autograd.grad(outer(delta), [delta, *weights], allow_unused=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivatives
        (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    descended = delta - rate * slope
    v = by_delta  # the first step from zero
    try:
        for _ in range(steps - 1):
            (product,) = torch.autograd.grad(descended, delta, v, retain_graph=True)
            v = product + by_delta
        implicit = torch.autograd.grad(descended, weights, v, allow_unused=True)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise NotApplicable(f"torch lacks second derivatives of the network: {error}") from error
    return [
        sum((part for part in parts if part is not None), torch.zeros_like(weight))
        for weight, *parts in zip(weights, direct, implicit, strict=True)
    ]
