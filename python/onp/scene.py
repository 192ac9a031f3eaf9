"""What every stage of a repair works on, and what it may ask there: triggers, squares, margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from onp.clean import Clean
from onp.config import Config
from onp.copies import with_copies
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.probes.additive import Additive
from onp.probes.contenders import successes_of
from onp.probes.departure import Departures, departures
from onp.probes.families import Family, Range
from onp.probes.generator import Generator
from onp.probes.margin import Margins, largest_margins
from onp.probes.norm_shift import NormShift
from onp.probes.patch import Patch
from onp.probes.probe import OneClass, Probe, Target
from onp.probes.race import Contender, race
from onp.probes.replay import Replayed, replay
from onp.probes.responses import activations, responses
from onp.probes.roaming import Roaming
from onp.probes.square import SIDES, SQUARES
from onp.probes.synthesis import FAMILIES, synthesise
from onp.probes.warp import Warp

REPLAYED = {family.name: family for family in (Generator(), *FAMILIES)}
"""The families that the norms' shift can be replayed by."""
RESPONSE_IMAGES = 64
"""Clean images on which responses and activation statistics are taken."""
LOOK: tuple[Family, ...] = (Patch(), Additive(), Warp())
"""What every class is looked at by: of a few low frequencies natural ones lead to any class."""
PLACES: tuple[Family, ...] = (*SQUARES, Roaming())
"""Squares: of each place, and last the one that has none."""
ROAMING = len(SQUARES)
LOOK_JUDGED = 32
"""Clean images on which that is judged,"""
SQUARES_JUDGED = 16
"""and those that squares are judged on."""
ANOTHER = 1000
"""Added to the seed for every other draw."""


@dataclass(frozen=True)
class Squares:
    """What squares of every place reach."""

    targets: Sequence[Target]
    successes: Tensor
    """Mean excess probability of the target, float32 [places, targets], in the first draw; of all
    ``PLACES`` in turn."""
    means: Mapping[int, Tensor] = field(default_factory=dict)
    """Of places that were looked at in more draws: the means of all of them, float32 [targets]."""

    @property
    def judged(self) -> Tensor:
        """The successes, or the means where there are some: what a verdict is of."""
        successes = self.successes.clone()
        for place, mean in self.means.items():
            successes[place] = mean
        return successes

    def best_place(self, target: Target) -> int:
        """Where the target's square works best over the others' in the same place, of those that
        have one. Of the first draw, which is of all places."""
        column = list(self.targets).index(target)
        successes = self.successes[:ROAMING]
        others = successes.index_fill(1, torch.tensor(column), 0.0)
        return int((successes[:, column] - others.max(1).values).argmax())


@dataclass(frozen=True)
class Scene:
    """What every stage works on."""

    model: nn.Module
    """In eval mode, on the evaluator's device."""
    evaluator: MaskEvaluator
    clean: Clean
    before: list[Tensor]
    """Every site layer's activations on the first ``RESPONSE_IMAGES``."""
    config: Config
    valid: Range
    seed: int
    copies: int = 0
    """How many of the clean images, the last ones, are copies of others."""

    @property
    def ledger(self) -> Ledger:
        return self.evaluator.ledger

    def with_copies(self) -> Scene:
        """With copies among the clean images where these are few: what a search is given."""
        if len(self.clean) >= self.config.copies.enough:
            return self
        with self.ledger.stage("copies"):
            clean = with_copies(
                self.clean, self.evaluator, self.config.copies, valid=self.valid, seed=self.seed
            )
        return replace(self, clean=clean, copies=len(clean) - len(self.clean))

    def replayed(
        self,
        shift: NormShift,
        family: str,
        targets: Sequence[Target] = (),
        steps: int | None = None,
    ) -> list[Replayed]:
        """Triggers that explain the norms' shift: see ``onp.probes.replay``. steps: default: the
        budget's."""
        config = self.config.replay
        if steps is not None:
            config = replace(config, steps=steps)
        return replay(
            shift, self.clean, config, REPLAYED[family],
            targets=targets, valid=self.valid, seed=self.seed, ledger=self.ledger,
        )  # fmt: skip

    def probed(
        self, targets: Sequence[Target], families: Sequence[Family] = FAMILIES, draw: int = 0
    ) -> list[Contender]:
        """Contenders of one trigger of each family for each of the targets, not raced; each
        ``draw`` has another start and other images."""
        config = self.config.synthesis
        with self.ledger.stage("probe"):
            return self.unraced(
                self._learned(
                    targets, families, config.steps, config.images_per_step, ANOTHER * draw
                )
            )

    def looks(self, targets: Sequence[int]) -> list[Contender]:
        """A trigger of a few steps of each family of ``LOOK`` for each of the classes: a backdoor's
        needs next to nothing, and more steps tell less, as natural directions catch up. Their
        rankings and masks, [S] each, are empty: nothing is raced. Costs 2 * look_steps *
        look_images image-forwards a trigger, and those of judging it on ``LOOK_JUDGED`` images."""
        config = self.config.synthesis
        with self.ledger.stage("probe"):
            probes = self._learned(targets, LOOK, config.look_steps, config.look_images)
            none = [torch.zeros(self.evaluator.trace.sites)] * len(probes)
            return self._reached(probes, none, LOOK_JUDGED)

    def squares(
        self,
        targets: Sequence[Target],
        judged: int = SQUARES_JUDGED,
        places: Sequence[int] = range(len(PLACES)),
        draw: int = 0,
    ) -> Squares:
        """A square in every one of ``PLACES`` for each of the targets; each ``draw`` has another
        start and learns on other images. Costs 2 * square_steps * square_images image-forwards a
        target and place, and those of judging them on ``judged`` images."""
        config, few = self.config.synthesis, self.clean[:judged]
        squares = [PLACES[place] for place in places]
        with self.ledger.stage("probe"):
            probes = [
                probe
                for first in range(0, len(squares), SIDES)  # few at a time, as images take room
                for probe in self._learned(
                    targets, squares[first : first + SIDES],
                    config.square_steps, config.square_images, ANOTHER * draw,
                )
            ]  # fmt: skip
            nothing = torch.zeros(self.evaluator.trace.sites, dtype=torch.bool)
            reached = successes_of(probes, self.evaluator, nothing, few.images, few.labels)
        return Squares(list(targets), torch.tensor(reached).view(-1, len(targets)))

    def departures(self, places: Sequence[int] = range(len(PLACES)), draw: int = 0) -> Departures:
        """A square in every one of ``PLACES`` that leads the images of each class away from it;
        otherwise as ``squares``. Costs 2 * square_steps image-forwards a class and place, and those
        of judging them."""
        config = self.config.synthesis
        with self.ledger.stage("probe"):
            return departures(
                self.evaluator.network, self.clean, {place: PLACES[place] for place in places},
                steps=config.square_steps, most=config.looked_at,
                valid=self.valid, seed=self.seed + ANOTHER * draw, ledger=self.ledger,
            )  # fmt: skip

    def margins(self, classes: Sequence[int]) -> Margins:
        """How far the margins of the classes can be driven."""
        config = self.config.synthesis
        with self.ledger.stage("probe"):
            return largest_margins(
                self.evaluator.network, self.clean, classes,
                steps=config.margin_steps, starts=config.margin_starts,
                valid=self.valid, seed=self.seed, ledger=self.ledger,
            )  # fmt: skip

    def raced(self, probes: Sequence[Probe]) -> list[Contender]:
        """The probes' contenders, best first."""
        return race(
            self.evaluator, self.clean.images, self.clean.labels, probes, self._rankings(probes),
            self.config.race, self.config.score,
        )  # fmt: skip

    def unraced(self, probes: Sequence[Probe]) -> list[Contender]:
        """The probes with what they reach."""
        return self._reached(probes, self._rankings(probes), self.config.race.first_images)

    def _learned(
        self, targets: Sequence[Target], families: Sequence[Family], steps: int, draw: int,
        other: int = 0,
    ) -> list[Probe]:  # fmt: skip
        """A trigger of each family for each of the targets, of so many steps on ``draw`` images;
        ``other`` starts and images the further this is from 0."""
        return synthesise(
            self.evaluator.network, self.clean.images, self.clean.labels, targets,
            steps=steps, draw=draw, families=families,
            valid=self.valid, seed=self.seed + other, ledger=self.ledger,
        )  # fmt: skip

    def _reached(
        self, probes: Sequence[Probe], rankings: Sequence[Tensor], images: int
    ) -> list[Contender]:
        """The probes with rankings float32 [S] and what they reach on the first ``images``."""
        nothing = torch.zeros(self.evaluator.trace.sites, dtype=torch.bool)
        few = self._told_by(probes)[:images]
        reached = successes_of(probes, self.evaluator, nothing, few.images, few.labels)
        return [
            Contender(probe, ranking, success, nothing)
            for probe, ranking, success in zip(probes, rankings, reached, strict=True)
        ]

    def _told_by(self, probes: Sequence[Probe]) -> Clean:
        """The clean images that tell what probes do: those of one class where they are after no
        others."""
        targets = {probe.target for probe in probes}
        if len(targets) == 1 and isinstance(target := targets.pop(), OneClass):
            return self.clean[(self.clean.labels == target.source).nonzero().squeeze(1)]
        return self.clean

    def _rankings(self, probes: Sequence[Probe]) -> list[Tensor]:
        network, told = self.evaluator.network, self._told_by(probes)
        seen = told.images[:RESPONSE_IMAGES]
        before = self.before if told is self.clean else activations(network, seen)
        return [responses(before, network, probe(seen), self.ledger) for probe in probes]
