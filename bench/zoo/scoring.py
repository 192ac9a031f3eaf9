"""How well a network answers clean and triggered images, and whether it is a fair case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.zoo.attacks import Attack
from bench.zoo.datasets import SUBSETS
from onp.data import ImageSet
from onp.errors import BadData
from onp.metrics import predict

LEAST_ACCURACY = {
    "cifar10": 0.70, "gtsrb": 0.90, "shapes": 0.80, "cifar2": 0.85, "cifar3": 0.80, "gtsrb5": 0.90,
}  # fmt: skip
"""Below this a clean network is too weak for its repairs to say much. Other data sets of some
classes have the bar of ``LEAST_OF_SUBSETS``."""
LEAST_OF_SUBSETS = {"cifar10": 0.75, "gtsrb": 0.90}
"""By the data set that they are classes of."""
LEAST_ASR = 0.80
LEAST_ASR_ALL_TO_ALL = 0.50
"""BackdoorBench's bar for a base network. An answer that depends on the image's own class cannot
come more often than the network knows that class."""
MOST_ACCURACY_LOST = 0.06
"""Against the clean twin. A backdoor that costs more would be noticed without any tool."""

_BATCH = 250


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1]; asr and ra are None without an attack."""

    ca: float
    asr: float | None = None
    ra: float | None = None


@dataclass(frozen=True)
class Exam:
    """What a network is scored on."""

    clean: ImageSet
    triggered: ImageSet | None = None
    """The test images whose label is not what the attack wants, triggered, with true labels."""
    wanted: Tensor | None = None
    """int64 [N]: what the attack wants for each of them."""

    @classmethod
    @torch.no_grad()
    def of(cls, test: ImageSet, attack: Attack | None) -> Exam:
        """Trigger what can be triggered, of an attack of several parts by each of these in turn.
        Raises BadData where the attack wants all true labels."""
        if attack is None:
            return cls(test)
        turns = torch.arange(len(test)) % len(attack.parts)
        answers = torch.stack([part.answers(test.labels) for part in attack.parts])
        wanted = answers[turns, torch.arange(len(test))]
        victims = wanted != test.labels
        if not bool(victims.any()):
            raise BadData(f"{attack.name} wants every test image's own label: ASR is undefined")
        images, turns = test[victims].floats(), turns[victims]
        for number, attacker in enumerate(attack.parts):
            for part in (turns == number).nonzero().squeeze(1).split(_BATCH):
                images[part] = attacker(images[part])
        pixels = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return cls(test, ImageSet(pixels, test.labels[victims]), wanted[victims])

    def part(self, count: int | None) -> Exam:
        """The first ``count`` images of both kinds, a fair draw where the test images are one."""
        if count is None or self.triggered is None or self.wanted is None:
            return self
        few = torch.arange(count)
        victims = few[few < len(self.wanted)]
        return Exam(
            self.clean[few[few < len(self.clean)]], self.triggered[victims], self.wanted[victims]
        )

    def score(self, model: nn.Module) -> Scores:
        """Raises where the network refuses the images or its logits are not finite."""
        ca = _share(predict(model, self.clean.floats(), _BATCH), self.clean.labels)
        if self.triggered is None or self.wanted is None:
            return Scores(ca)
        answers = predict(model, self.triggered.floats(), _BATCH)
        return Scores(ca, _share(answers, self.wanted), _share(answers, self.triggered.labels))

    def attack_success(self, model: nn.Module) -> float | None:
        """ASR alone: for a twin, how often the triggered images are mistaken without a backdoor."""
        if self.triggered is None or self.wanted is None:
            return None
        return _share(predict(model, self.triggered.floats(), _BATCH), self.wanted)


def unfair(
    dataset: str, attack: Attack | None, scores: Scores, twin_accuracy: float | None
) -> str | None:
    """Why a network is no fair case; None if it is one."""
    least = LEAST_ACCURACY.get(dataset)
    if least is None:
        least = LEAST_OF_SUBSETS[SUBSETS[dataset][0]]
    if twin_accuracy is not None:
        least = max(least, twin_accuracy - MOST_ACCURACY_LOST)
    if scores.ca < least:
        return f"clean accuracy {scores.ca:.3f} is below {least:.3f}"
    if attack is None or scores.asr is None:
        return None
    to_one = all(part.single_target for part in attack.parts)
    least = LEAST_ASR if to_one else LEAST_ASR_ALL_TO_ALL
    if scores.asr < least:
        return f"attack success {scores.asr:.3f} is below {least:.2f}"
    return None


def _share(answers: Tensor, right: Tensor) -> float:
    return float((answers == right).double().mean())
