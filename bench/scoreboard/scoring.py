"""CA, ASR and RA of networks on one fixed set of test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from bench.scoreboard.rows import der
from bench.zoo.attacks import Attack
from bench.zoo.datasets import fingerprint
from bench.zoo.scoring import Exam, Scores
from onp.data import ImageSet, draw_balanced

LoadImages = Callable[[str, Path | None, str], ImageSet]
"""(data set, folder of the data, split) to its images."""

TEST_SEED = 0
"""Of the draw of test images: the same for every network and defence."""


class Subject(Protocol):
    """A network of the zoo, its card and its attack."""

    @property
    def card(self) -> dict[str, Any]: ...

    @property
    def model(self) -> nn.Module:
        """In eval mode: images float [N, 3, H, W] in [0, 1] to logits [N, K]."""
        ...

    @property
    def digest(self) -> str:
        """Hex digits that another checkpoint or trigger does not share; of fair networks alone."""
        ...

    @property
    def attack(self) -> Attack | None:
        """None for a clean twin."""
        ...


@dataclass(frozen=True)
class Baseline:
    """A network before any defence."""

    scores: Scores
    asr_clean_twin: float | None


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
        self._test_data: dict[str, str] = {}
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

    def test_data(self, dataset: str) -> str:
        """Fingerprint of the test images."""
        if dataset not in self._test_data:
            self._test_data[dataset] = fingerprint(self.test(dataset))
        return self._test_data[dataset]

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
