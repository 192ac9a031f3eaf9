"""What every attack provides: a trigger, the answer it wants, how it poisons training images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from onp.triggers import to_8_bits

Log = Callable[[str], None]


@dataclass(frozen=True)
class Knowledge:
    """What an attacker may use to build a trigger before training."""

    images: Tensor
    """uint8 [N, H, W, 3], the training images."""
    labels: Tensor
    """int64 [N]."""
    surrogate: nn.Module
    """A clean classifier of the same data: images float [N, 3, H, W] in [0, 1] to logits."""
    log: Log = print


class Attack(ABC):
    """A trigger and how it gets into a network.

    Images are float [N, 3, H, W] in [0, 1], what a trigger returns is rounded to 8 bits.
    """

    name: ClassVar[str]
    clean_label: ClassVar[bool] = False
    """Only images of the target class are triggered, and labels stay."""
    cover: ClassVar[float] = 0.0
    """Cover images (triggered otherwise, true label) for each poisoned one."""
    share: float = 1.0
    """Of the poisoned images, where it is a part of an attack, over the other parts' shares."""
    online: ClassVar[bool] = False
    """The trigger is learned together with the network, by ``batch``."""

    def __init__(self, *, target: int, classes: int, size: int = 32, seed: int = 0) -> None:
        self.target = target
        self.classes = classes
        self.size = size
        self.seed = seed

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """The trigger as it is used against the trained network."""

    def answers(self, labels: Tensor) -> Tensor:
        """int64 [N]: what the attacker wants the network to answer."""
        return torch.full_like(labels, self.target)

    @property
    def parts(self) -> Sequence[Attack]:
        """The attacks whose triggers a network is taught: this one, or several."""
        return (self,)

    @property
    def single_target(self) -> bool:
        """Whether all classes that are sent to another one are sent to the same."""
        labels = torch.arange(self.classes)
        answers = self.answers(labels)
        return len(answers[answers != labels].unique()) == 1

    def covers(self, labels: Tensor) -> Tensor:
        """bool [N]: images that may serve as cover: those that may be poisoned, and are not."""
        return self.answers(labels) != labels

    def prepare(self, knowledge: Knowledge) -> None:  # most need nothing
        """Build what the trigger needs from data; called once before poisoning."""
        return None

    def poisoned(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """The training images that teach the trigger, where they differ from ``self(images)``."""
        return self(images)

    def covered(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """The cover images: triggered in another way, true labels kept."""
        raise NotImplementedError(f"{self.name} has no cover images")

    def batch(
        self, network: nn.Module, images: Tensor, labels: Tensor, ratio: float,
        random: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What the network is trained on in this step, of clean images [N, 3, H, W] with labels
        [N]; the attack may learn here."""
        raise NotImplementedError(f"{self.name} is not learned during training")

    def state(self) -> dict[str, Tensor]:
        """Tensors that ``load_state`` needs to trigger images again; empty for pure formulas."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # most have none
        """Take back what ``state`` gave."""
        return None


_ANOTHER_STREAM = 1_000_000_007
"""Training draws its order from the same seed: were the poisoned images drawn from it too, they
would be the first that a network sees, in batches without a clean one."""


def poison(
    attack: Attack, images: Tensor, labels: Tensor, *, ratio: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Poison ``ratio`` of all images, uint8 [N, H, W, 3]; returns new (images, labels).

    Dirty-label attacks take images whose wanted answer is not their label and relabel them;
    clean-label attacks take images of the target class and keep the label. Either take at most half
    of those that there are, so that the network still sees clean ones of their classes.
    Cover images are taken from the rest, as the attack has it, and keep their label. Of an attack
    of several parts each has its share, of images of its own.
    """
    random = torch.Generator().manual_seed(_ANOTHER_STREAM + seed)
    order = torch.randperm(len(labels), generator=random)
    poisoned, answers = images.clone(), labels.clone()
    shares = sum(part.share for part in attack.parts)
    for part in attack.parts:
        wanted = part.answers(labels)
        eligible = wanted == labels if part.clean_label else wanted != labels
        able = order[eligible[order]]
        count = min(round(ratio * part.share / shares * len(labels)), len(able) // 2)
        chosen, rest = able[:count], order[~torch.isin(order, able[:count])]
        covers = rest[part.covers(labels)[rest]][: round(part.cover * count)]
        answers[chosen] = wanted[chosen]
        _write(poisoned, chosen, partial(part.poisoned, labels=labels[chosen], random=random))
        if len(covers):
            _write(poisoned, covers, partial(part.covered, labels=labels[covers], random=random))
        order = rest[~torch.isin(rest, covers)]
    return poisoned, answers


def drawn_by_pixels(images: Tensor, choices: int) -> Tensor:
    """A number below ``choices`` for each image [N, C, H, W] of multiples of 1/255, int64 [N]: the
    same one for the same pixels, whatever is drawn for the others."""
    levels = images.flatten(1).mul(255).round().long()
    weights = torch.arange(levels.shape[1]).mul(7919).remainder(10_007).add(1)
    return (levels * weights).sum(1).remainder(2_147_483_647).remainder(choices)


def _write(images: Tensor, index: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    clean = images[index].permute(0, 3, 1, 2).float() / 255
    images[index] = to_8_bits(change(clean)).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
