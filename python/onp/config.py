"""Budgets and hyper-parameters, frozen. Budgets count image-forwards, never seconds.

A forward of one image counts 1, with the gradient of its pixels 2, with weight gradients 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SearchPrecision = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class UnlearningConfig:
    """Gradient ascent on the clean images (RNP's first step, Li et al., ICML 2023)."""

    learning_rate: float = 0.01
    momentum: float = 0.9
    batch: int = 64
    """With 128 it takes as many steps, of twice the images, and leaves the same classes."""
    gradient_norm: float = 20.0
    stop_accuracy: float = 0.2
    """Stop once the accuracy on a batch is at most this."""
    max_steps: int = 40
    gentle_rate: float = 0.003
    """Without batch norms nothing holds the activations, and such steps end at whatever class comes
    first: this learning rate there,"""
    gentle_norm: float = 1.0
    """this norm of the gradient,"""
    gentle_steps: int = 80
    """and so many steps at most."""


@dataclass(frozen=True)
class SynthesisConfig:
    """Trigger synthesis; every (family, class) pair is one trigger."""

    steps: int = 50
    images_per_step: int = 24
    """Images that each trigger sees in a step."""
    classes: int = 3
    """How many classes are probed once one is called: that one and those nearest by the looks."""
    look_steps: int = 5
    """Every class is looked at first: so many steps (with more, natural directions catch up),"""
    look_images: int = 4
    """on so many images each,"""
    looked_at: int = 64
    """for so many classes at most: if there are more, those that unlearning leaves."""
    square_steps: int = 5
    """The same classes are looked at by squares: so many steps in every place,"""
    square_images: int = 2
    """on so many images each."""
    look_beside: bool = True
    """Whether the classes are also looked at where norms call one of ten or more: an attacker may
    have taught further triggers, of other classes or of the same."""
    margin_steps: int = 10
    """Where none of that calls a backdoor, the classes' margins are driven, in so many steps"""
    margin_starts: int = 8
    """from so many images of noise each."""
    renewal_steps: int = 30
    """Steps when the probes are renewed against the best mask."""
    counted: int = 3
    """At most this many probes of a target count, the best first (and squares, where these call
    one of several targets, or beside looks or norms);"""
    counted_margin: float = 0.1
    """a further one counts if its best mask is worth at most this less than the best's,"""
    counted_lead: float = 0.6
    """or if it leads other classes by this (binary logarithm)"""
    counted_success: float = 0.5
    """and works so often, whatever its mask is worth: no mask of a race may do where a backdoor is
    spread over many sites."""
    through_strength: float = 0.7
    """A renewed probe gets through if it is this much stronger than another class needs to be
    (binary logarithm), and"""
    through_success: float = 0.5
    """if it makes at least this share of the images answer its class, and"""
    through_worth: float = 0.6
    """if its best mask is worth at least this: what a mask does not take away leads a search
    nowhere."""


@dataclass(frozen=True)
class ReplayConfig:
    """The triggers that explain the batch norms' shift: see ``onp.probes.replay``."""

    measured: int = 1000
    """Clean images, at most, that the shift is measured on, each in four forms."""
    least_excess: float = 1.3
    """Shift of the norms, over what chance makes of it, from which on it is replayed, and down to
    which it is explained."""
    steps: int = 40
    """At most: a family that can explain the shift takes 10 to 30."""
    doubted_steps: int = 0
    """At most, where fewer steps call a backdoor that more might not: see ``doubted_effort``."""
    enough: float = 0.1
    """Share of the shift's square that may stay unexplained however large it is."""
    images_per_step: int = 24
    judged: int = 250
    """Images, at most, on which is seen what a trigger reaches."""
    families: tuple[str, ...] = ("generator", "patch", "additive", "low_frequency", "warp")
    """One trigger of each is learned; the first also tries label shifts and, if one is called,
    the others too."""
    alone: float = 0.85
    """Agreement with the shift from which on these triggers stand for the attacker's of their class
    alone, or with squares that lead to it beyond doubt. Below it squares and probes are asked, too,
    and what they find for the same class counts as well. With fewer than ten classes a square
    counts beside them, however they agree."""
    poisoned: float = 0.06
    """Assumed share of training images that were triggered: a trigger's effect on the norms scales
    with it. Poisoning a tenth moves them as .07 of them would, a twentieth as .04."""
    target_weight: float = 0.5
    """Of the cross-entropy to a target that is asked for."""
    held_back: float = 0.3
    """Share of the images that such a trigger is judged on."""
    apart_weight: float = 0.05
    """Of the cross-entropy to several targets, which only tells their triggers apart: more makes
    them larger than the attacker's."""
    most_unexplained: float = 0.5
    """Share of the shift's square that triggers of several targets may leave."""


SHIPPED = "shipped"
"""The policy that comes along."""


@dataclass(frozen=True)
class CopiesConfig:
    """Copies of the clean images, where these are few: see ``onp.copies``."""

    enough: int = 250
    """Images that a search is given: with fewer, copies as well. With this many, more tell no more
    than draws differ by."""
    tries: int = 2
    """Copies that are looked at for each that is wanted, at most."""
    shift: float = 0.16
    """Share of the width and of the height, at most, by which a copy is moved;"""
    turn: float = 0.2
    """radians by which it is turned;"""
    scale: float = 0.2
    """share by which it grows or shrinks;"""
    light: float = 0.3
    """by which its contrast does; and half of this, of all light, by which it is brighter."""


@dataclass(frozen=True)
class GatesConfig:
    """The relaxed mask, proposed by the policy and adapted by descent: see ``onp.agent.gates``."""

    policy: str | None = None
    """What proposes the gates that descent starts from: the file of a policy
    (``bench.train_agent`` makes such), or ``SHIPPED``; None: all are open."""
    seen: int = 64
    """Images on which the policy is told the effects of flips;"""
    adapted_steps: int = 8
    """of descent from its proposal,"""
    adapted_rate: float = 0.03
    """at this learning rate. From open gates:"""
    steps: int = 25
    images_per_step: int = 32
    """Clean images in a step, and as many triggered ones."""
    learning_rate: float = 0.1
    noisy_steps: int = 30
    noisy_images: int = 16
    """The same of a further start, which noise is to lead elsewhere."""
    clean_weight: float = 6.0
    """Of the clean images' cross-entropy and divergence from the original."""
    price: float = 0.02
    """Of a closed gate, over the site's response to the probes,"""
    responses: tuple[float, float] = (0.3, 5.0)
    """which counts within these bounds."""
    counts: tuple[int, ...] = (1, 2, 4, 6, 9, 13, 18, 25, 34, 45)
    """Sites that the masks made from the gates prune."""


@dataclass(frozen=True)
class RaceConfig:
    """Masks from rankings, raced on few images first."""

    sizes: tuple[float, ...] = (0.003, 0.005, 0.01, 0.015, 0.02, 0.03)
    """Shares of all sites that a ranking's masks prune."""
    least_success: float = 0.25
    """Probes that make fewer images answer their class (mean probability) are not raced, nor do
    they, or a square, count where the norms have called."""
    first_images: int = 48
    """Clean images (and as many triggered ones) that every candidate sees."""
    second_images: int = 128
    survivors: float = 0.25


@dataclass(frozen=True)
class AgentConfig:
    """The search by flips and the model that corrects what is foreseen: see ``onp.agent``."""

    images: int = 500
    """Clean images (and as many triggered ones in all) that worth and reward are measured on;"""
    raced: int = 128
    """of these, so many say which of a start's first masks are evaluated on all."""
    starts: int = 2
    """At most, each from gates of its own: there is another one as long as"""
    dear: float = 0.2
    """the first draw's best mask costs more, its sites' price included, in nats an image."""
    tries: int = 4
    """Noisy gates that a further start takes the best of; 0: its gates are learned as the first."""
    rounds: int = 16
    """Of a start on its first draw of the images, at most,"""
    further: tuple[int, ...] = (8,)
    """and on each further one, where enough images are left to give back by."""
    pool: int = 96
    """Flips that promise most, from which a round's set is grown:"""
    first: int = 24
    """the first one of at most so many,"""
    most: int = 48
    """and any of these."""
    little: float = 0.002
    """A round that raises the worth by no more, in nats an image, brings next to nothing;"""
    patience: int = 2
    """so many of them in a row end a draw."""
    hidden: int = 32
    messages: int = 1
    """Rounds of message passing."""
    steps: int = 0
    """Of Adam after each round of the search; 0, as it comes: what is foreseen is trusted as it is.
    What the agent learns takes nothing off a repair's cost (bench/NOTES.md, "One set a round")."""
    replayed: int = 2
    """Earlier states in each step."""
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class CostConfig:
    """What a mask costs: see ``onp.agent.cost``."""

    success_weight: float = 1.5
    """Of a triggered image's nats over a clean one's."""
    strengths: tuple[float, ...] = (1.0, 1.5)
    """Multiples of a replayed trigger's change, in turn: what it would be had .06 of the images
    been poisoned, and .04. What counts beside it comes so, too."""
    price: float = 0.0005
    """Of a pruned site, in the search."""


@dataclass(frozen=True)
class ChoiceConfig:
    """What is given back, and the last choice among masks: see ``onp.agent.choice``."""

    leaders: int = 0
    """Best masks of each draw's search that take part, beside what was left of the best one."""
    images: int = 250
    """Of those that a draw's search has not seen, at most so many judge what is given back;"""
    least: int = 100
    """with fewer, nothing is."""
    rounds: int = 1
    """Of giving back, after each draw."""
    judged: int = 500
    """Images of all that the last pick is made on, at most."""
    success_weight: float = 2.0
    """As in the search's cost, but dearer: an attacker's trigger works better than what stands for
    it here."""


@dataclass(frozen=True)
class ScoreConfig:
    """What a mask is worth against one probe: see ``onp.probes.objective``."""

    accuracy_weight: float = 3.0
    """Probe success that one unit of clean accuracy is worth."""
    price: float = 0.0005
    """Cost of one pruned site."""


@dataclass(frozen=True)
class VerdictConfig:
    """When a backdoor is called: see ``onp.verdict``."""

    threshold: float = 0.55
    lead: float = 1.15
    """Binary logarithm of the strength of the best trigger of a look over its family's for any
    other class: full evidence; .63 calls. Clean networks of ten classes and more reach .4, those
    that it calls start at .8."""
    lead_few: float = 0.6
    """As much more is asked, as a share, for every class fewer than ten."""
    least_success: float = 0.5
    """Of a trigger that leads: one that works on few images leads by chance."""
    rivals: int = 4
    """Where a square leads over fewer other classes, more is asked:"""
    scarcity: float = 1.2
    """by this share for every class that is missing."""
    square_lead: tuple[float, float] = (1.0, 2.8)
    """Binary logarithm of a square's success over that of any other class's in its place. In one
    draw clean networks reach 2.5, and once 3.5; the threshold is at 2.0, for the mean of three."""
    departure_lead: tuple[float, float] = (1.7, 3.6)
    """The same of squares that lead one class's images away, over those of any other class: called
    from 2.7 on. Clean networks reach 2.2, where they work on half of the images; a trigger that
    works on one class alone 3.2 to 4.3."""
    gathered: float = 0.2
    """Share of all classes' images, led away by squares in one place, that must come to the same
    class, and"""
    gathered_lead: tuple[float, float] = (1.2, 3.0)
    """the binary logarithm of that share over any other class's: called from 2.2 on. Clean networks
    of ten classes and more reach 1.8, backdoored ones that squares miss start at 2.4."""
    further_lead: tuple[float, float] = (1.5, 3.0)
    """Where a class is called already, binary logarithm of the lead of a look, and of a square, for
    another one, from which on this is called too: natural squares reach 2.5 there, those of a
    second trigger start at 3.5;"""
    further_success: float = 0.8
    """and share of the images that it must work on: of natural looks that lead .6."""
    square_floor: float = 0.05
    """Of that success: what is below counts as this."""
    shift: tuple[float, float] = (0.4, 1.4)
    """Binary logarithm of a label shift's share over that of the shift by two."""
    square_shift: tuple[float, float] = (0.05, 0.35)
    """Of the images, that a square shifts by one, less one class's share: networks without such a
    backdoor reach .09, those with one start at .27."""
    square_few: float = 0.06
    """Share of the images on which a square must work beyond ``least_success``, for every class
    fewer than ten: with five classes, squares of clean networks that lead work on .69 at most."""
    margin_lead: tuple[float, float] = (0.2, 0.75)
    """Binary logarithm of a class's largest margin over any other's, in logits and as a multiple of
    its clean images', whichever is less: called from .5 on. Clean networks of ten classes and more
    reach .34."""
    margin_few: float = 0.17
    """As much more is asked, as a share, for every class fewer than ten: clean networks of five and
    three reach .62 and .84, where .9 and 1.1 are asked."""
    moving: float = 1.5
    """Times as large is chance where norms remember many batches (``norm_shift.LONG``): the network
    moved meanwhile. Clean networks reach an excess of 2.6 then, backdoored ones start at 3.4."""
    certain: float = 0.6
    """Score of the norm statistics from which on they alone say that there is a backdoor,"""
    certain_agreement: float = 0.65
    """if the triggers agree so far with the norms' shift: what explains little of it may lead to
    another class (.49 to .61 where it did; .67 and more where it was right)."""
    excess: tuple[float, float] = (1.2, 2.2)
    """The norms' shift over what chance makes of it."""
    share: tuple[float, float] = (0.2, 0.6)
    """Share of the clean images that the replayed triggers move to one class, or to those of
    several triggers, on average."""
    beside: float = 0.1
    """Share of the images that such triggers bring to a further class, on average, which then has a
    trigger of its own: with one attacker's trigger .04 at most, with two .17 and more."""
    effort: tuple[float, float] = (1.85, 2.2)
    """Size of the patch that explains the norms' shift, over what it explains of the excess (in
    units of what chance makes of 500 images). Backdoored networks come to 1.3 (with other
    augmentations to 1.5, of three classes to 1.8, SIG to 1.9), clean ones of an excess of 1.7 and
    more to 2.1 to 3.5."""
    doubted_effort: float = 1.5
    """Where triggers of the quick budget's few steps take so much of it, agree with the shift by
    less than ``certain_agreement`` or score less than ``certain``, they are learned for longer
    before a backdoor is called: few steps leave a patch small, and clean networks then come down
    to 1.3."""


@dataclass(frozen=True)
class GraphConfig:
    """The neuron graph: see ``onp.graph``."""

    strongest: int = 8
    """Inter-layer edges kept per node."""
    similarity: float = 0.3
    """Smallest similarity of two connection-strength profiles that makes an intra-layer edge."""
    neighbours: int = 8
    """Intra-layer edges kept per node."""
    layerwise: bool = False
    """Only intra-layer edges: one graph per layer, as in the paper."""


@dataclass(frozen=True)
class AftercareConfig:
    """Fine-tuning after pruning, where it is asked for: see ``onp.aftercare``."""

    epochs: int = 10
    batch: int = 50
    """Clean images, and as many triggered ones."""
    learning_rate: float = 0.002
    momentum: float = 0.9
    success_weight: float = 1.5
    """Of a triggered image's nats over a clean one's."""
    steepest: float = 1.0
    """Largest norm of a gradient; longer ones are cut to it."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on besides model, data and seed."""

    budget: str = "standard"
    search_precision: SearchPrecision = "fp32"
    """Of the masks that a search on a CPU asks for, where the processor has instructions for it
    (AVX-512 BF16, or VNNI). 8 bits were a tenth to a fifth faster, of fp32 kernels slower than
    these, and in 31 pairs of repairs cost .4 points of DER, nearly all on three of one
    architecture; in twelve later ones neither they nor bf16, which saves little, cost any
    (bench/NOTES.md)."""
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    copies: CopiesConfig = field(default_factory=CopiesConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    race: RaceConfig = field(default_factory=RaceConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    choice: ChoiceConfig = field(default_factory=ChoiceConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    aftercare: AftercareConfig = field(default_factory=AftercareConfig)


BUDGETS: dict[str, Config] = {
    "quick": Config(
        "quick",
        unlearning=UnlearningConfig(max_steps=15, gentle_steps=30),
        synthesis=SynthesisConfig(
            steps=20, images_per_step=16, renewal_steps=15, look_beside=False
        ),
        replay=ReplayConfig(
            measured=500, steps=16, doubted_steps=40, images_per_step=16, judged=64, alone=0.0
        ),
        gates=GatesConfig(
            steps=30, images_per_step=16, learning_rate=0.1, counts=(2, 6, 13, 25, 45)
        ),
        race=RaceConfig(sizes=(0.003, 0.01, 0.03), first_images=32, second_images=64),
        agent=AgentConfig(images=250, starts=1, rounds=6, further=(), pool=64),
        cost=CostConfig(success_weight=2.0),
        choice=ChoiceConfig(leaders=2, images=100, success_weight=2.7),
        aftercare=AftercareConfig(epochs=4),
    ),
    "standard": Config("standard"),
    "thorough": Config(
        "thorough",
        synthesis=SynthesisConfig(steps=80, images_per_step=48, classes=4, renewal_steps=60),
        replay=ReplayConfig(steps=80, images_per_step=64),
        agent=AgentConfig(starts=3, dear=0.0, tries=0, rounds=32, little=0.0005, patience=3),
        choice=ChoiceConfig(leaders=2, rounds=2),
    ),
}
"""What --budget names."""
