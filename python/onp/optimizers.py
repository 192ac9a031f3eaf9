"""Adam and SGD by torch's functional forms: the same arithmetic as ``torch.optim``'s classes, whose
first use imports torch's compiler, two to three seconds in every process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

Group = tuple[Sequence[Tensor], float]
"""Parameters and their learning rate."""


class Adam:
    """Kingma & Ba, ICLR 2015."""

    def __init__(self, *groups: Group, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.groups = [list(parameters) for parameters, _ in groups]
        self.rates = [rate for _, rate in groups]
        """May be changed between steps."""
        self.betas = betas
        flat = [parameter for group in self.groups for parameter in group]
        self._means = {p: torch.zeros_like(p) for p in flat}
        self._squares = {p: torch.zeros_like(p) for p in flat}
        self._steps = {p: torch.zeros(()) for p in flat}

    def zero_grad(self) -> None:
        for group in self.groups:
            forget_gradients(group)

    @torch.no_grad()
    def step(self) -> None:
        """Parameters without a gradient stay as they are."""
        for group, rate in zip(self.groups, self.rates, strict=True):
            moved = [parameter for parameter in group if parameter.grad is not None]
            adam(
                moved,
                [p.grad for p in moved if p.grad is not None],
                [self._means[p] for p in moved],
                [self._squares[p] for p in moved],
                [],
                [self._steps[p] for p in moved],
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )


class Sgd:
    """Gradient descent with momentum."""

    def __init__(self, parameters: Iterable[Tensor], rate: float, momentum: float) -> None:
        self.parameters = list(parameters)
        self.rate, self.momentum = rate, momentum
        self._buffers: dict[Tensor, Tensor | None] = dict.fromkeys(self.parameters)

    def zero_grad(self) -> None:
        forget_gradients(self.parameters)

    @torch.no_grad()
    def step(self) -> None:
        """Parameters without a gradient stay as they are."""
        moved = [parameter for parameter in self.parameters if parameter.grad is not None]
        buffers = [self._buffers[p] for p in moved]
        sgd(
            moved,
            [p.grad for p in moved if p.grad is not None],
            buffers,
            weight_decay=0.0,
            momentum=self.momentum,
            lr=self.rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        self._buffers.update(zip(moved, buffers, strict=True))


def forget_gradients(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
