"""LC: label-consistent backdoor (Turner, Tsipras & Madry, arXiv 1912.02771)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.attacks.base import Knowledge
from bench.zoo.attacks.patch import Patch
from bench.zoo.attacks.surrogate import device_of, frozen
from onp.triggers import to_8_bits


class LabelConsistent(Patch):
    """A 3x3 checkerboard in all four corners; clean label.

    Images of the target class are made hard to recognise first, by an adversarial perturbation
    against a clean classifier (section 4), so that the network has to learn the corners. The
    paper's attack on an ensemble of robust classifiers is here one on a plain classifier: ten steps
    of projected gradient descent inside the L_inf ball of 16/255 (the paper compares 8, 16 and 32).
    """

    name = "lc"
    clean_label = True
    side = 3
    epsilon = 16 / 255
    steps = 10

    def __init__(self, *, target: int, classes: int, size: int = 32, seed: int = 0) -> None:
        super().__init__(target=target, classes=classes, size=size, seed=seed)
        self._surrogate: nn.Module | None = None

    def prepare(self, knowledge: Knowledge) -> None:
        """Keep the classifier that training images are perturbed against."""
        self._surrogate = frozen(knowledge.surrogate)

    def arrays(self) -> dict[str, Tensor]:
        board = (torch.arange(self.side)[:, None] + torch.arange(self.side) + 1) % 2
        mask, pattern = torch.zeros(self.size, self.size), torch.zeros(self.size, self.size)
        ends = slice(None, self.side), slice(-self.side, None)
        for rows in ends:
            for columns in ends:
                mask[rows, columns] = 1
                pattern[rows, columns] = board.float()
        return {"mask": mask, "pattern": pattern[..., None].expand(-1, -1, 3).contiguous()}

    def poisoned(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """Raises RuntimeError before ``prepare``."""
        if self._surrogate is None:
            raise RuntimeError(f"{self.name}: prepare the attack with a surrogate first")
        parts = [
            hard_to_recognise(self._surrogate, x, y, self.epsilon, self.steps, random)
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        ]
        return self(to_8_bits(torch.cat(parts)))


def hard_to_recognise(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, steps: int,
    random: torch.Generator,
) -> Tensor:  # fmt: skip
    """Images within ``epsilon`` of the given ones, in [0, 1], on which the model's loss is high.

    Projected gradient descent with signed steps from a random start (Madry et al., arXiv
    1706.06083); steps of 2.5 epsilon / steps can cross the ball.
    """
    device = device_of(model)
    clean, labels = images.to(device), labels.to(device)
    start = (torch.rand(images.shape, generator=random) * 2 - 1) * epsilon
    moved = (clean + start.to(device)).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), labels), moved)
        moved = moved.detach() + gradient.sign() * (2.5 * epsilon / steps)
        moved = torch.clamp(moved, clean - epsilon, clean + epsilon).clamp(0, 1)
    return moved.to(images.device)
