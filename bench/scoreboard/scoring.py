"""CA, ASR and RA of networks on one fixed set of test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.scoreboard.rows import der
from bench.zoo.attacks import Attack
from onp.data import ImageSet, draw_balanced
from onp.errors import BadData
from onp.metrics import predict

LoadImages = Callable[[str, Path | None, str], ImageSet]
"""(data set, folder of the data, split) to its images."""

TEST_SEED = 0
"""Of the draw of test images: the same for every network and defence."""

_BATCH = 250


class Subject(Protocol):
    """A network of the zoo, its card and its attack."""

    @property
    def card(self) -> dict[str, Any]: ...

    @property
    def model(self) -> nn.Module:
        """In eval mode: images float [N, 3, H, W] in [0, 1] to logits [N, K]."""
        ...

    @property
    def attack(self) -> Attack | None:
        """None for a clean twin."""
        ...


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1]; asr and ra are None without an attack."""

    ca: float
    asr: float | None = None
    ra: float | None = None


@dataclass(frozen=True)
class Baseline:
    """A network before any defence."""

    scores: Scores
    asr_clean_twin: float | None


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
        """Trigger what can be triggered. Raises BadData where the attack wants all true labels."""
        if attack is None:
            return cls(test)
        wanted = attack.answers(test.labels)
        victims = wanted != test.labels
        if not bool(victims.any()):
            raise BadData(f"{attack.name} wants every test image's own label: ASR is undefined")
        floats = test[victims].floats()
        images = torch.cat([attack(part) for part in floats.split(_BATCH)])
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


def effectiveness(before: Scores, after: Scores) -> float | None:
    """DER; None without an attack."""
    if before.asr is None or after.asr is None:
        return None
    return der(before.asr, after.asr, before.ca, after.ca)


class Examiner:
    """Images and baselines of all networks, each loaded or scored once."""

    def __init__(
        self,
        subjects: Mapping[str, Subject],
        load: LoadImages,
        *,
        data: Path | None,
        test_images: int,
        clean_samples: int,
        seeds: Sequence[int],
    ) -> None:
        self._subjects = subjects
        self._load = load
        self._data = data
        self._test_images = test_images
        self._clean_samples = clean_samples
        self._seeds = seeds
        self._test: dict[str, ImageSet] = {}
        self._clean: dict[str, dict[int, ImageSet]] = {}
        self._baselines: dict[str, Baseline] = {}
        self._latest: tuple[str, Exam] | None = None

    def test(self, dataset: str) -> ImageSet:
        """A seeded draw of test images, classes as even as the data allow."""
        if dataset not in self._test:
            whole = self._load(dataset, self._data, "test")
            self._test[dataset] = draw_balanced(
                whole, min(self._test_images, len(whole)), TEST_SEED
            )
        return self._test[dataset]

    def clean(self, dataset: str, seed: int) -> ImageSet:
        """The clean training images that a defence gets."""
        if dataset not in self._clean:
            train = self._load(dataset, self._data, "train")
            self._clean[dataset] = {
                seed: draw_balanced(train, self._clean_samples, seed) for seed in self._seeds
            }
        return self._clean[dataset][seed]

    def exam(self, name: str) -> Exam:
        """The exam of one network; only the latest is held."""
        if self._latest is None or self._latest[0] != name:
            subject = self._subjects[name]
            self._latest = (name, Exam.of(self.test(subject.card["dataset"]), subject.attack))
        return self._latest[1]

    def baseline(self, name: str) -> Baseline:
        """The network and its clean twin before any defence."""
        if name not in self._baselines:
            exam, subject = self.exam(name), self._subjects[name]
            twin = self._subjects.get(subject.card["twin"])
            excused = exam.attack_success(twin.model) if twin and twin.card["fair"] else None
            self._baselines[name] = Baseline(exam.score(subject.model), excused)
        return self._baselines[name]


def _share(answers: Tensor, right: Tensor) -> float:
    return float((answers == right).double().mean())
