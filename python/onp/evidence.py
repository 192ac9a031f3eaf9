"""What speaks for a backdoor: first what the batch norms remember, then how far a few steps of
triggers and of squares lead to each class, and where none of them calls one, how far the classes'
margins can be driven and where each class's images go once they are led away. What is called is
probed by every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from onp.agent.contenders import counted_contenders, leading, strength
from onp.agent.race import Contender
from onp.clean import Clean
from onp.config import Config
from onp.evaluate import MaskEvaluator
from onp.probes.families import Family, Range
from onp.probes.margin import Margins
from onp.probes.norm_shift import NormShift, norm_shift
from onp.probes.probe import LabelShift, OneClass, Probe, Target
from onp.probes.responses import responses
from onp.probes.unlearning import Unlearned, unlearn
from onp.scene import PLACES, RESPONSE_IMAGES, ROAMING, Scene, Squares
from onp.suspect.network import FrozenNetwork
from onp.verdict import (
    MANY_CLASSES,
    Verdict,
    also_called,
    as_sure,
    beyond_doubt,
    by_departures,
    by_label_shift,
    by_margins,
    by_probes,
    by_shifting_squares,
    by_squares,
    by_statistics,
    target_of,
)

SHIFTS_JUDGED = 64
"""Clean images on which squares are judged that shift labels: fewer of them have to work."""
DRAWS = (0, 1, 2)
"""Of squares: the first, and those that a place that speaks for a class is looked at in as well."""
UNCONFIRMED = 0.5
"""Score, at most, of what a place says that more draws of it do not bear out."""
LEAST_A_CLASS = 4
"""Clean images a class, on average, that the norms' shift is measured on at least."""


@dataclass(frozen=True)
class Call:
    """What is called, and the squares that stand for its trigger, where they call it too."""

    verdict: Verdict
    draws: Sequence[tuple[int, int]]
    """By place and draw: of one trigger that squares call the first draw, of several, and beside
    looks if squares are beyond doubt, all of them, as one of many has fewer images to be told by.
    """
    alone: bool = False
    """Whether nothing else does."""

    @property
    def target(self) -> int:
        assert isinstance(self.verdict.target, int)
        return self.verdict.target


@dataclass(frozen=True)
class Evidence:
    """A verdict and what it rests on."""

    verdict: Verdict
    contenders: list[Contender]
    """Of all probes."""
    counted: list[Contender]
    """Those that stand for the trigger in the search; none without a backdoor."""
    statistics: Verdict | None = None
    """What the norm statistics alone say, where they were asked."""
    looked: Sequence[Contender] = ()
    """The triggers that every class was looked at by, where that was asked."""
    squares: Squares | None = None
    """What squares reach, where they were asked."""
    margins: Margins | None = None
    """How far margins can be driven, where they were asked as nothing else called a backdoor."""
    unlearned: Unlearned | None = None
    """Where there are too many classes to look at them all."""
    unlearning: Tensor | None = None
    """Response of every site to it, float32 [S]."""


def measured_shift(
    evaluator: MaskEvaluator,
    model: nn.Module,
    clean: Clean,
    config: Config,
    *,
    valid: Range,
    seed: int,
) -> NormShift | None:
    """The norms' shift, on as many clean images as the budget has it, but on some of every class:
    class means are taken out of it."""
    count = max(config.replay.measured, LEAST_A_CLASS * evaluator.trace.num_classes)
    some = clean[:count]
    return norm_shift(
        evaluator.network, model, some.images, some.labels,
        valid=valid, seed=seed, ledger=evaluator.ledger,
    )  # fmt: skip


def gather(scene: Scene, shift: NormShift | None) -> Evidence:
    """The norm statistics' evidence if it is certain, and what probes find for the same class if
    its triggers explain only a part of the shift, or a square, where classes are few; else that of
    squares for a shift of labels, of probes where these call none, or the norms', whichever is
    stronger. Where the norms' triggers explain little, probes that call a backdoor know its class
    better. Where they explain it all, other classes may have triggers of their own."""
    config = scene.config
    first = from_statistics(scene, shift)
    called = first is not None and first.verdict.target is not None
    agreement = 1.0 if first is None else first.verdict.evidence.get("agreement", 1.0)
    certain = first is not None and first.verdict.score >= config.verdict.certain
    few = scene.evaluator.trace.num_classes < MANY_CLASSES
    if first is not None and certain and agreement >= config.verdict.certain_agreement:
        if few:
            return with_square(scene, first, None)
        if agreement >= config.replay.alone or first.verdict.also:
            return with_others(scene, first)
        return together(first, from_probes(scene, called), config)
    second = from_shifting_squares(scene) or from_probes(scene, called)
    if first is None:
        return second
    agree = agreement >= config.verdict.certain_agreement
    if called and agree and beyond_doubt(second.verdict, config.verdict):
        return together(first, second, config)
    named = second.verdict.target is not None and agreement < config.verdict.certain_agreement
    if called and not named and first.verdict.score > second.verdict.score:
        return with_square(scene, first, second.squares) if few else first
    return replace(second, statistics=first.verdict)


def together(first: Evidence, second: Evidence, config: Config) -> Evidence:
    """The verdict of the first, and what counts in either, if the second calls the same class, or
    another beyond doubt."""
    same = second.verdict.target == first.verdict.target
    if not same and not beyond_doubt(second.verdict, config.verdict):
        return first
    return replace(
        second,
        verdict=also_called(first.verdict, [second.verdict]),
        contenders=[*second.contenders, *first.contenders],
        counted=[*second.counted, *first.counted],
        statistics=first.statistics,
    )


def with_others(scene: Scene, found: Evidence) -> Evidence:
    """Norms tell of the trigger that moved them most: what looks and squares call beyond doubt
    beside its class counts as well, if the budget has it asked."""
    taken = [one for one in found.verdict.targets if isinstance(one, int)]
    if not scene.config.synthesis.look_beside or not taken:
        return found
    classes, unlearned, unlearning = suspects(scene)
    looked = scene.looks(classes)
    squares, calls = from_looks(scene, looked, scene.squares(classes), taken=taken)
    near = [one for one in nearest(looked) if one not in taken]
    contenders, counted = standing_for(scene, calls, squares, near) if calls else ([], [])
    return replace(
        found,
        verdict=also_called(found.verdict, [one.verdict for one in calls]),
        contenders=[*found.contenders, *contenders],
        counted=[*found.counted, *counted],
        looked=looked, squares=squares, unlearned=unlearned, unlearning=unlearning,
    )  # fmt: skip


def with_square(scene: Scene, found: Evidence, squares: Squares | None) -> Evidence:
    """Among few classes much else explains the norms' shift as well as the attacker's trigger does:
    a square of the class that is called counts beside the norms' triggers, learned where squares
    (those given, if the class was asked for) lead to it most, if it works."""
    target = found.verdict.target
    if not isinstance(target, int):
        return found
    if squares is None or target not in squares.targets:
        squares = scene.squares(range(scene.evaluator.trace.num_classes))
    learned = scene.probed([target], [PLACES[squares.best_place(target)]])[0]
    counted = [learned, *found.counted] if _works(learned, scene.config) else found.counted
    return replace(found, contenders=[learned, *found.contenders], counted=counted, squares=squares)


def from_statistics(scene: Scene, shift: NormShift | None) -> Evidence | None:
    """Replay the norms' shift, as a label shift too if no class speaks clearly: by the first
    family and, if a shift is called, by all. None where there is nothing to replay, or where it
    leads to a class without clean images: the class itself is then what they lack."""
    config = scene.config
    if shift is None or shift.excess < config.replay.least_excess:
        return None
    classes, labels = scene.evaluator.trace.num_classes, scene.clean.labels[: len(shift.clean)]
    excess = shift.excess / (config.verdict.moving if shift.long else 1.0)
    with scene.ledger.stage("replay"):
        families = config.replay.families
        replayed = [scene.replayed(shift, family)[0] for family in families]
        verdict = by_statistics(
            excess, len(shift.clean), replayed, config.verdict, labels.unique().tolist()
        )
        named = target_of(replayed)
        probes = [one.probe for one in replayed if one.probe.target == named]
        if not bool((labels == probes[0].wanted(labels)).any()):
            return None
        if verdict.also:
            jointly = explaining_together(scene, shift, verdict)
            probes = jointly or [o.probe for o in replayed if o.probe.target in verdict.targets]
        if verdict.score < config.verdict.certain and classes > 2:
            one, two = (
                scene.replayed(shift, families[0], [LabelShift(classes, by)])[0] for by in (1, 2)
            )
            shifted = by_label_shift(excess, one, two, config.verdict)
            if shifted.score > verdict.score:
                verdict, probes = shifted, [one.probe]
                if shifted.target is not None:
                    for name in families[1:]:
                        probes.append(scene.replayed(shift, name, [shifted.target])[0].probe)
    if verdict.target is None:
        return Evidence(verdict, [], [], verdict)
    with scene.ledger.stage("respond"):
        contenders = sorted(scene.unraced(probes), key=lambda contender: -contender.success)
    own = [one for one in contenders if one.probe.target == verdict.target]
    counted = [one for one in contenders if _works(one, config) or one is own[0]]
    stand = {one.probe.target for one in counted}
    verdict = replace(verdict, also=tuple(one for one in verdict.also if one in stand))
    return Evidence(verdict, contenders, counted, verdict)


def explaining_together(scene: Scene, shift: NormShift, verdict: Verdict) -> list[Probe]:
    """Of every family a trigger for each of the classes that are called, which explain the norms'
    shift together; none of families that explain too little of it."""
    config = scene.config.replay
    most = max(config.most_unexplained, (config.least_excess / shift.excess) ** 2)
    return [
        one.probe
        for name in config.families
        for one in scene.replayed(shift, name, verdict.targets)
        if one.unexplained <= most
    ]


def from_shifting_squares(scene: Scene) -> Evidence | None:
    """Look for a shift of all labels by one (all-to-all) by squares, against one by two; if it is
    called, probe both with every family and race the first. None if it is not, or where the images
    are of fewer than three classes."""
    config, classes = scene.config, scene.evaluator.trace.num_classes
    present = len(scene.clean.labels[:SHIFTS_JUDGED].unique())
    if present < 3:
        return None
    shift, control = LabelShift(classes, 1), LabelShift(classes, 2)
    squares = scene.squares([shift, control], SHIFTS_JUDGED)
    verdict, place = by_shifting_squares(squares.successes, shift, present, config.verdict)
    if verdict.target is None:
        return None
    caller = scene.probed([shift], PLACES[place : place + 1])[0]
    contenders = raced_for(scene, shift, [caller, *scene.probed([shift, control])])
    counted = counted_contenders(contenders, caller.probe, config.synthesis)
    return Evidence(verdict, contenders, counted, squares=squares)


def from_probes(scene: Scene, called: bool = False) -> Evidence:
    """Look at every class (64 at most) by a few steps of triggers and of squares; where neither
    these nor the norms (``called``) call one, margins may, and then squares that lead each class
    away. Classes that are called are probed by every family, and so are those that are nearest by
    the looks, and their probes are raced."""
    config = scene.config
    classes, unlearned, unlearning = suspects(scene)
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
        counted = [one for one in contenders if _works(one, config)] or contenders[:1]
    if isinstance(verdict.target, int):
        if calls[0].verdict.target is None:
            calls = [Call(verdict, draws, alone=bool(draws))]
        contenders, counted = standing_for(scene, calls, squares, nearest(looked))
        verdict = also_called(verdict, [one.verdict for one in calls[1:]])
    return Evidence(
        verdict, contenders, counted, looked=looked, squares=squares, margins=margins,
        unlearned=unlearned, unlearning=unlearning,
    )  # fmt: skip


def suspects(scene: Scene) -> tuple[Sequence[int], Unlearned | None, Tensor | None]:
    """The classes to look at: all, or if there are too many those that unlearning leaves; then what
    it left, and how much it changed each site, float32 [S]."""
    classes, most = range(scene.evaluator.trace.num_classes), scene.config.synthesis.looked_at
    if len(classes) <= most:
        return classes, None, None
    unlearned, changed = left_by_unlearning(scene)
    return unlearned.suspects(most), unlearned, changed


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
    beyond doubt. And the squares, with what was drawn again."""
    config, calls = scene.config.verdict, list[Call]()
    left = [one for one in squares.targets if isinstance(one, int) and one not in taken]
    while True:
        further = bool(calls or taken)
        some = [one for one in looked if one.probe.target in left]
        said = by_probes(some, config, called and not further)
        squares, seen, place = from_squares(scene, squares, left)
        both = said.target is not None and said.target == seen.target
        said = as_sure(said, seen) if both else said
        verdict = said if said.score >= seen.score else seen
        if further:
            sure = [one for one in (said, seen) if beyond_doubt(one, config)]
            if not sure:
                break
            verdict = sure[0]
        beside = both and beyond_doubt(seen, config)
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
    scene: Scene, squares: Squares, classes: Sequence[int]
) -> tuple[Squares, Verdict, int]:
    """What the squares, of every place, say of some of their classes, and the place that says it.
    Those of a place that scores at all are learned from two more starts, and the means must call: a
    natural direction that leads far need not do so from another start, an attacker's mostly does
    (bench/NOTES.md, "Squares, three times"). Where the square without a place would call the class
    by itself, in the one draw that it may have had, it stands for what the others show."""
    columns = [list(squares.targets).index(one) for one in classes]
    while True:
        verdict, place = by_squares(squares.judged[:, columns], classes, scene.config.verdict)
        if verdict.score == 0.0 or place in squares.means:
            break
        more = [scene.squares(squares.targets, places=[place], draw=draw) for draw in DRAWS[1:]]
        drawn = torch.stack([squares.successes[place], *(one.successes[0] for one in more)])
        squares = replace(squares, means={**squares.means, place: drawn.mean(0)})
    roams, _ = by_squares(squares.judged[ROAMING:, columns], classes, scene.config.verdict)
    roaming = verdict.target is not None and roams.target == verdict.target
    return squares, verdict, ROAMING if roaming else place


def from_departures(scene: Scene) -> tuple[Verdict, list[tuple[int, int]]]:
    """What squares that lead each class's images away say; a place that calls is looked at from two
    more starts, and the mean must call the same. And squares that stand for the trigger, by place
    and draw: three of that place for one class's images, or one of each of the three places where
    most images come to the class. Not asked where the images are of fewer than ten classes."""
    config = scene.config.verdict
    found = scene.departures()
    if len(found.sources) < MANY_CLASSES:
        reason = "score 0.00: too few classes have images enough to see where these go"
        return Verdict("clean", 0.0, None, "squares", {"advantage": 0.0}, reason), []
    verdict, place = by_departures(found, config)
    if verdict.target is None:
        return verdict, []
    more = [scene.departures([place], draw) for draw in DRAWS[1:]]
    first = found.gained[list(found.places).index(place)]
    mean = torch.stack([first, *(one.gained[0] for one in more)]).mean(0, keepdim=True)
    again, _ = by_departures(replace(more[0], gained=mean), config)
    if again.target != verdict.target:
        score = min(again.score, UNCONFIRMED)
        reason = f"score {score:.2f}: more draws do not bear out what squares led images to"
        again = replace(again, finding="clean", target=None, score=score, reason=reason)
    if isinstance(again.target, int):
        gathered = found.gained.mean(1)[:, again.target].topk(len(DRAWS)).indices.tolist()
        return again, [(found.places[row], 0) for row in gathered]
    return again, [(place, draw) for draw in DRAWS]


def left_by_unlearning(scene: Scene) -> tuple[Unlearned, Tensor]:
    """What unlearning leaves of the network, and how much that changes each site, float32 [S]."""
    network, images = scene.evaluator.network, scene.clean.images
    with scene.ledger.stage("unlearn"):
        unlearned = unlearn(
            scene.model, images, scene.clean.labels, scene.config.unlearning,
            seed=scene.seed, ledger=scene.ledger,
        )  # fmt: skip
        left = FrozenNetwork(network.trace, unlearned.model, network.device)
        return unlearned, responses(scene.before, left, images[:RESPONSE_IMAGES], scene.ledger)


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


def standing_for(
    scene: Scene, calls: Sequence[Call], squares: Squares, near: Sequence[int]
) -> tuple[list[Contender], list[Contender]]:
    """Probes of the classes that are called, raced, and of those of ``near`` (the nearest first)
    that are not, as many as there are beside one; and which of them stand for the triggers."""
    own = [one.target for one in calls]
    others = [one for one in near if one not in own][: scene.config.synthesis.classes - 1]
    probed = scene.probed([*own, *others])
    contenders, counted = list[Contender](), list[Contender]()
    for call in calls:
        some = [one for one in probed if one.probe.target in (call.target, *others)]
        place = call.draws[0][0] if call.draws else squares.best_place(call.target)
        raced, stand = standing_for_one(scene, call, some, PLACES[place])
        contenders += [one for one in raced if one.probe.target == call.target]
        counted += stand
    return [*contenders, *(one for one in probed if one.probe.target in others)], counted


def standing_for_one(
    scene: Scene, call: Call, contenders: Sequence[Contender], square: Family
) -> tuple[list[Contender], list[Contender]]:
    """Of the contenders, which are of the class that is called and of others, those of the class
    raced, and which of them stand for its trigger: among them the one that leads most, or the
    ``square``, learned as long as the others, where it was not probes that called or none of them
    works; and beside them further squares of the call. Where its squares stand alone, those that
    work, and nothing else: what may lie anywhere is not told by what lies in one place."""
    verdict, target, config = call.verdict, call.target, scene.config
    several = [one for one in learned_in(scene, target, call.draws) if _works(one, config)]
    if several and call.alone:
        contenders = raced_for(scene, target, [*several, *contenders])
        probes = [one.probe for one in several]
        return contenders, [one for one in contenders if one.probe in probes]
    caller = leading(contenders, config.verdict.least_success, target)
    if several and (caller is None or verdict.by == "squares"):
        caller, *several = several
        contenders = [caller, *contenders]
    elif caller is None or verdict.by != "probes":
        learned = scene.probed([target], [square])[0]
        contenders = [learned, *contenders]
        if verdict.by == "squares" or _works(learned, config):
            caller = learned
    if caller is None:
        own = (one for one in contenders if one.probe.target == target)
        caller = max(own, key=lambda one: one.success)
    contenders = raced_for(scene, target, contenders)
    counted = counted_contenders(contenders, caller.probe, config.synthesis)
    return [*several, *contenders], [*counted, *several]


def learned_in(scene: Scene, target: Target, several: Sequence[tuple[int, int]]) -> list[Contender]:
    """Squares by place and draw, learned at length for the target, not raced."""
    return [scene.probed([target], [PLACES[place]], draw)[0] for place, draw in several]


def _works(contender: Contender, config: Config) -> bool:
    """Whether it is raced at all."""
    return contender.success >= config.race.least_success


def raced_for(scene: Scene, target: Target, contenders: Sequence[Contender]) -> list[Contender]:
    """The target's contenders, raced, and the others as they are."""
    with scene.ledger.stage("race"):
        own = scene.raced([c.probe for c in contenders if c.probe.target == target])
    return own + [one for one in contenders if one.probe.target != target]
