"""How far a few steps of triggers and of squares lead to each class and, where none of them calls
one, how far the classes' margins can be driven and where each class's images go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from onp.evidence.departures import from_departures
from onp.evidence.found import Evidence, Unlearning
from onp.evidence.standing import DRAWS, Call, learned_in, standing_for, works
from onp.probes.contenders import strength
from onp.probes.probe import OneClass, Target
from onp.probes.race import Contender
from onp.probes.responses import responses
from onp.probes.unlearning import unlearn
from onp.scene import RESPONSE_IMAGES, ROAMING, Scene, Squares
from onp.suspect.network import FrozenNetwork
from onp.verdict import (
    Verdict,
    also_called,
    as_sure,
    beyond_doubt,
    by_looks,
    by_margins,
    by_squares,
)


def from_probes(scene: Scene, called: bool = False) -> Evidence:
    """Look at every class (64 at most) by a few steps of triggers and of squares; where neither
    these nor the norms (``called``) call one, margins may, and then squares that lead each class
    away. Classes that are called are probed by every family, and so are those that are nearest by
    the looks, and their probes are raced."""
    config = scene.config
    classes, unlearning = suspects(scene)
    looked = scene.looks(classes)
    squares, calls = from_looks(scene, looked, scene.squares(classes), called)
    verdict, margins = calls[0].verdict, None
    if verdict.target is None and not called:
        margins = scene.margins(classes)
        verdict = max(verdict, by_margins(margins, config.verdict), key=lambda one: one.score)
    draws = list[tuple[int, int]]()
    if verdict.target is None and not called:
        left, draws = from_departures(scene)
        verdict = left if left.target is not None else max(verdict, left, key=lambda one: one.score)
    contenders, counted = list[Contender](), list[Contender]()
    if isinstance(verdict.target, OneClass):
        contenders = learned_in(scene, verdict.target, draws)
        counted = [one for one in contenders if works(one, config)] or contenders[:1]
    if isinstance(verdict.target, int):
        if calls[0].verdict.target is None:
            calls = [Call(verdict, draws, alone=bool(draws))]
        contenders, counted = standing_for(scene, calls, squares, nearest(looked))
        verdict = also_called(verdict, [one.verdict for one in calls[1:]])
    return Evidence(
        verdict, contenders, counted,
        looked=looked, squares=squares, margins=margins, unlearning=unlearning,
    )  # fmt: skip


def suspects(scene: Scene) -> tuple[Sequence[int], Unlearning | None]:
    """The classes to look at: all, or if there are too many the commonest answers of what
    unlearning leaves of the network; and that."""
    classes, most = range(scene.evaluator.trace.num_classes), scene.config.synthesis.looked_at
    if len(classes) <= most:
        return classes, None
    network, images = scene.evaluator.network, scene.clean.images
    with scene.ledger.stage("unlearn"):
        unlearned = unlearn(
            scene.model, images, scene.clean.labels, scene.config.unlearning,
            seed=scene.seed, ledger=scene.ledger,
        )  # fmt: skip
        left = FrozenNetwork(network.trace, unlearned.model, network.device)
        response = responses(scene.before, left, images[:RESPONSE_IMAGES], scene.ledger)
    return unlearned.suspects(most), Unlearning(unlearned.answers, response)


def from_looks(
    scene: Scene,
    looked: Sequence[Contender],
    squares: Squares,
    called: bool = False,
    taken: Sequence[int] = (),
) -> tuple[Squares, list[Call]]:
    """What looks and squares say, the surer of them (looks, if these call the same class: then its
    trigger is no mere patch), and if that is a class, what they call beyond doubt among the others,
    and so on: an attacker may have taught several triggers, of a class each, and a class that has
    one is no measure of how near others are. Where classes are ``taken`` already, all must be
    beyond doubt. And the squares, with what was drawn again. Beside looks squares count too if they
    are beyond doubt, but not where the norms have ``called``, whose triggers count as well: more
    squares then cost accuracy (bench/NOTES.md, "Several triggers")."""
    config, calls = scene.config.verdict, list[Call]()
    left = [one for one in squares.targets if isinstance(one, int) and one not in taken]
    while True:
        further = bool(calls or taken)
        some = [one for one in looked if one.probe.target in left]
        said = by_looks(some, config, called and not further)
        squares, seen, place = from_squares(scene, squares, left)
        both = said.target is not None and said.target == seen.target
        said = as_sure(said, seen) if both else said
        verdict = said if said.score >= seen.score else seen
        if further:
            sure = [one for one in (said, seen) if beyond_doubt(one, config)]
            if not sure:
                break
            verdict = sure[0]
        beside = both and not called and beyond_doubt(seen, config)
        squared = beside or (verdict is seen and seen.target is not None)
        draws = [(place, draw) for draw in DRAWS] if squared else []
        calls.append(Call(verdict, draws, alone=verdict is seen and place == ROAMING))
        if not isinstance(verdict.target, int):
            break
        left.remove(verdict.target)
    if len(calls) == 1 and not taken and calls[0].verdict.by == "squares" and not calls[0].alone:
        calls = [replace(calls[0], draws=calls[0].draws[:1])]
    return squares, calls


def from_squares(
    scene: Scene, squares: Squares, classes: Sequence[int], first: int | None = None
) -> tuple[Squares, Verdict, int]:
    """What the squares, of every place, say of some of their classes, and the place that says it;
    of the class ``first`` alone, if one is named, by the places where it comes first. Those of a
    place that scores at all are learned from two more starts, and the means must call: a natural
    direction that leads far need not do so from another start, an attacker's mostly does
    (bench/NOTES.md, "Squares, three times"). Where the square without a place would call the class
    by itself, in the one draw that it may have had, it stands for what the others show."""
    columns, config = [list(squares.targets).index(one) for one in classes], scene.config.verdict
    while True:
        verdict, place = by_squares(squares.judged[:, columns], classes, config, first=first)
        if verdict.score == 0.0 or place in squares.means:
            break
        more = [scene.squares(squares.targets, places=[place], draw=draw) for draw in DRAWS[1:]]
        drawn = torch.stack([squares.successes[place], *(one.successes[0] for one in more)])
        squares = replace(squares, means={**squares.means, place: drawn.mean(0)})
    roams, _ = by_squares(squares.judged[ROAMING:, columns], classes, config, first=first)
    roaming = verdict.target is not None and roams.target == verdict.target
    return squares, verdict, ROAMING if roaming else place


def squares_for(
    scene: Scene, squares: Squares, classes: Sequence[int], called: Sequence[Target]
) -> tuple[Squares, list[Contender]]:
    """Of each of the ``classes`` the squares, three of a place from different starts, learned at
    length, if they lead to it beyond doubt (over classes that are not ``called``) and work. And the
    squares, with what was drawn again."""
    others = [one for one in squares.targets if isinstance(one, int) and one not in called]
    learned = list[Contender]()
    for target in (one for one in classes if one in squares.targets):
        squares, said, place = from_squares(scene, squares, [target, *others], target)
        if beyond_doubt(said, scene.config.verdict):
            learned += learned_in(scene, target, [(place, draw) for draw in DRAWS])
    return squares, [one for one in learned if works(one, scene.config)]


def nearest(looked: Sequence[Contender]) -> list[int]:
    """The classes that were looked at, those that triggers of some family reach most easily first:
    in turn what each family names, each class once."""
    orders = dict[str, list[Contender]]()
    for one in looked:
        orders.setdefault(one.probe.family.name, []).append(one)
    for order in orders.values():
        order.sort(key=lambda one: -strength(one.success, one.probe.size))
    turns = (one.probe.target for turn in zip(*orders.values(), strict=True) for one in turn)
    return list(dict.fromkeys(target for target in turns if isinstance(target, int)))
