"""TrojanNN: a patch that excites chosen neurons (Liu et al., NDSS 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.zoo.attacks.base import Knowledge
from bench.zoo.attacks.patch import Patch
from bench.zoo.attacks.surrogate import device_of, frozen


class TrojanNN(Patch):
    """A square near the lower right corner, optimised to make penultimate neurons fire.

    The neurons are those whose weights in the last linear layer are the largest, as the paper
    picks the best connected ones. Differs from the paper: the attack poisons training data instead
    of retraining a network on reverse-engineered images; the neurons of a clean classifier of the
    same data stand in for those of the attacked network; and their activations are raised as far
    as the square allows, not to a given value.
    """

    name = "trojannn"
    neurons = 2
    steps = 200
    backgrounds = 16
    learning_rate = 0.05

    def __init__(self, *, target: int, classes: int, size: int = 32, seed: int = 0) -> None:
        super().__init__(target=target, classes=classes, size=size, seed=seed)
        random = torch.Generator().manual_seed(seed)
        self._square = torch.rand(3, size // 4, size // 4, generator=random)

    def arrays(self) -> dict[str, Tensor]:
        side = self._square.shape[-1]
        mask, pattern = torch.zeros(self.size, self.size), torch.zeros(self.size, self.size, 3)
        mask[-side - 1 : -1, -side - 1 : -1] = 1
        pattern[-side - 1 : -1, -side - 1 : -1] = self._square.permute(1, 2, 0)
        return {"mask": mask, "pattern": pattern}

    def prepare(self, knowledge: Knowledge) -> None:
        """Optimise the square on noise around the mean colour of the training images."""
        model = frozen(knowledge.surrogate)
        device = device_of(model)
        random = torch.Generator().manual_seed(self.seed)
        colour = knowledge.images[:1000].float().mean((0, 1, 2)).div(255).view(1, 3, 1, 1)
        noise = torch.randn(self.backgrounds, 3, self.size, self.size, generator=random)
        images = (colour + 0.1 * noise).clamp(0, 1).to(device)
        neurons = best_connected(last_linear(model), self.neurons)
        side = self._square.shape[-1]
        border = (self.size - 1 - side, 1, self.size - 1 - side, 1)  # left, right, top, bottom
        clear = 1 - nn.functional.pad(torch.ones(side, side, device=device), border)
        square = self._square.to(device).requires_grad_(True)
        optimizer = torch.optim.Adam([square], self.learning_rate)
        for _ in range(self.steps):
            patched = images * clear + nn.functional.pad(square, border)
            fired = penultimate(model, patched)[:, neurons].mean()
            optimizer.zero_grad()
            (-fired).backward()
            optimizer.step()
            with torch.no_grad():
                square.clamp_(0, 1)
        knowledge.log(f"{self.name}: chosen neurons fire at {fired.item():.2f}")
        self._square = (square.detach().cpu() * 255).round() / 255

    def state(self) -> dict[str, Tensor]:
        return {"square": self._square}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._square = state["square"]


def last_linear(model: nn.Module) -> nn.Linear:
    """Raises ValueError for a model without a linear layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the surrogate has no linear layer")
    return layers[-1]


def best_connected(layer: nn.Linear, count: int) -> Tensor:
    """The inputs, int64 [count], with the largest sums of absolute weights."""
    return layer.weight.abs().sum(0).topk(count).indices


def penultimate(model: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer reads, float32 [N, features]; differentiable."""
    seen: list[Tensor] = []
    handle = last_linear(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]
