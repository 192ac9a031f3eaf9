"""The search for a mask on one network: everything that stays the same between its rounds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onp.agent.caution import CautionModel
from onp.agent.choice import Choice, choose
from onp.agent.cost import Cost, Told
from onp.agent.effects import flip_effects
from onp.agent.elite import Elite
from onp.agent.flips import Round, give_back, improve
from onp.agent.gates import learn_gates
from onp.agent.learner import Learner
from onp.agent.relaxed import RelaxedCost
from onp.agent.state import State
from onp.agent.weights import load_policy
from onp.config import GatesConfig
from onp.evidence import Evidence
from onp.features import node_features
from onp.graph import NeuronGraph
from onp.masks import heads_of
from onp.probes.probe import Probe, Strengthened, Trigger
from onp.probes.race import Contender
from onp.probes.responses import activation_statistics
from onp.scene import Scene

log = logging.getLogger("onp")

FINALISTS = 3
"""Best masks of a search that are kept: where no images are left to give back by, all take part in
the last choice. So many win the race of the first masks, at most."""
CLOSE = 2
"""Standard errors of its difference to the best, by which a mask may lose that race."""
SEEDS_APART = 101
"""Seeds of the gates of one start and the next."""

CALIBRATION_IMAGES = 64
"""Clean and triggered ones that a search in less than fp32 is calibrated on."""
CONFIRMED = 0.05
"""Nats by which the worth of its best mask may be off what fp32 says, or it goes on in fp32."""


@dataclass(frozen=True, eq=False)
class Found:
    """What one start led to."""

    masks: list[Tensor]
    """bool [S] each, the one of the last draw first."""
    worth: float
    """Of the best mask on the first draw, in fp32."""
    rounds: list[Round]


class Search:
    """Improves masks against the counted probes; holds no mask itself."""

    def __init__(
        self, scene: Scene, graph: NeuronGraph, norm_shift: Tensor, evidence: Evidence
    ) -> None:
        """norm_shift: float32 [S], of every site's own norm, 0 where it has none."""
        self.scene = scene
        self.evaluator = scene.evaluator
        self.clean = scene.clean
        self.config, self.seed = scene.config, scene.seed
        self.graph = graph
        self.norm_shift = norm_shift
        self.evidence = evidence
        self.starts = 0
        """Made so far."""
        self._told: dict[tuple[object, ...], Told] = {}
        """What costs on the same images and triggers were told, whatever they weigh."""

    def features(self, counted: Sequence[Contender], gates: Tensor) -> Tensor:
        """The node features, float32 [S, F]."""
        trace, evidence = self.evaluator.trace, self.evidence
        own = evidence.verdict.targets
        nothing = torch.zeros(trace.sites)
        return node_features(
            trace, self.scene.model, self.graph, activation_statistics(self.scene.before),
            self.norm_shift,
            gates,
            nothing if evidence.unlearning is None else evidence.unlearning.response,
            [c.ranking for c in counted],
            [c.ranking for c in evidence.contenders if c.probe.target not in own],
        )  # fmt: skip

    def cost(
        self,
        counted: Sequence[Contender],
        images: slice | Tensor,
        success_weight: float | None = None,
        exact: bool = False,
    ) -> Cost:
        """The cost on a part of the clean images: a slice, or places int64 [n]. Where there are
        triggers of several targets, each of these weighs as much as one alone would, though its
        triggers have a share of the images; but not where norms called, whose triggers come
        stronger than the attacker's."""
        config = self.config.cost
        if success_weight is not None:
            config = replace(config, success_weight=success_weight)
        probes = [contender.probe for contender in counted]
        reached = [contender.success for contender in counted]
        factors = [1.0] * len(probes)
        if not self.evidence.verdict.by_norms:
            targets = [probe.target for probe in probes]
            factors = [len(probes) / targets.count(target) for target in targets]
        places = torch.arange(len(self.clean))[images].tolist()
        told = self._told.setdefault((*probes, *places), {})
        return Cost(
            self.evaluator, self.clean[images], [self._trigger(probe) for probe in probes], config,
            exact, reached, told, factors,
        )  # fmt: skip

    def _trigger(self, probe: Probe) -> Trigger:
        """What stands for the attacker's trigger: a replayed one at several strengths, as how much
        of it the norms remember hangs on the share of poisoned images, which is not known. A shift
        of labels needs the image left as it is."""
        if self.evidence.verdict.by_norms and isinstance(probe.target, int):
            return Strengthened(probe, self.config.cost.strengths)
        return probe

    def calibrate(self, cost: Cost, start: Tensor) -> None:
        """Let costs be told in bf16 or 8 bits, if that is configured: with ranges of the first and
        the last of the masks bool [B, S] that a start has, as what they prune moves values too far
        for ranges that have not seen it. Once a start: where fp32 does not confirm, it stays with
        fp32."""
        precision = self.config.search_precision
        if precision != "fp32":
            ends = start[:: max(1, len(start) - 1)]
            for told in self._told.values():  # by the ranges of another start
                for name in [name for name in told if not name[0]]:
                    del told[name]
            self.evaluator.calibrate(precision, ends, cost.sample(CALIBRATION_IMAGES))

    def relaxed(
        self, counted: Sequence[Contender], config: GatesConfig | None = None
    ) -> RelaxedCost:
        """The cost of gates."""
        return RelaxedCost(
            self.evaluator.network, self.clean, [c.probe for c in counted],
            torch.stack([c.ranking for c in counted]).mean(0), config or self.config.gates,
        )  # fmt: skip

    def nothing_pruned(self, counted: Sequence[Contender]) -> State:
        """What flips would do to the network as it came."""
        cost = self.cost(counted, slice(self.config.gates.seen))
        nothing = torch.zeros(self.evaluator.trace.sites, dtype=torch.bool)
        return State.of(nothing, flip_effects(cost, nothing))

    def proposal(self, counted: Sequence[Contender], name: str) -> Tensor:
        """How far a policy closes each gate, float32 [S]: one pass."""
        policy = load_policy(name)
        features = self.features(counted, torch.zeros(self.evaluator.trace.sites))
        inputs = self.nothing_pruned(counted).inputs.cpu()
        with torch.no_grad():
            closed: Tensor = policy(self.graph, features, inputs)
        return closed

    def gates(
        self, counted: Sequence[Contender], number: int = 0, config: GatesConfig | None = None
    ) -> Tensor:
        """The relaxed mask against the counted probes, float32 [S]: how far each gate closes, as
        the policy proposes and descent adapts it to this network. number: each draws images of its
        own."""
        config = config or self.config.gates
        start = torch.ones(self.evaluator.trace.sites)
        steps, rate = config.steps, config.learning_rate
        if config.policy is not None:
            start = start - self.proposal(counted, config.policy)
            steps, rate = config.adapted_steps, config.adapted_rate
        return learn_gates(
            self.relaxed(counted, config), start, steps=steps, learning_rate=rate,
            seed=self.seed + SEEDS_APART * number, ledger=self.evaluator.ledger,
        )  # fmt: skip

    def other_gates(self, counted: Sequence[Contender], number: int) -> Tensor:
        """Where the start before was dear, gates that lead elsewhere: learned on fewer images a
        step, as noise leaves what descent would always end in, several times; those whose first
        masks are worth most, which tells before a round is searched."""
        gates, tries = self.config.gates, self.config.agent.tries
        noisy = replace(gates, steps=gates.noisy_steps, images_per_step=gates.noisy_images)
        first = 1 + (number - 1) * tries
        found = [self.gates(counted, draw, noisy) for draw in range(first, first + tries)]
        cost = self.cost(counted, self.draw(0)[0])
        worths = [
            float(cost.worth(self.raced(counted, self.first_masks(counted, one))).max())
            for one in found
        ]
        return found[worths.index(max(worths))]

    def first_masks(self, counted: Sequence[Contender], ranking: Tensor) -> Tensor:
        """Where the search starts: the heads of the gates' ranking float32 [S] and what the
        contenders that were raced won with; bool [B, S]."""
        raced = [contender.mask[None] for contender in counted if contender.size > 0]
        closed = int((ranking > 0).sum())
        heads = heads_of(ranking, [n for n in self.config.gates.counts if n <= closed])
        return torch.cat([torch.zeros(1, len(ranking), dtype=torch.bool), heads, *raced])

    def find(
        self, counted: Sequence[Contender], known: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Round]]:
        """Finalists, masks bool [S] of the best start first, and the rounds' logs: gates are
        learned and the agent goes on from there, and again from other gates, as long as what was
        found is dear."""
        agent, ledger = self.config.agent, self.evaluator.ledger
        found = list[Found]()
        rounds = list[Round]()
        for number in range(agent.starts):
            with ledger.stage("gates"):
                again = number > 0 and agent.tries > 0
                gates = (self.other_gates if again else self.gates)(counted, number)
            with ledger.stage("agent"):
                found.append(self.run(counted, gates, known))
            rounds += [replace(one, start=self.starts) for one in found[-1].rounds]
            self.starts += 1
            if found[-1].worth >= -agent.dear:
                break
            log.info("the best mask of start %d costs %.3f nats", number + 1, -found[-1].worth)
        found.sort(key=lambda start: -start.worth)
        return [mask for start in found for mask in start.masks], rounds

    def run(self, counted: Sequence[Contender], ranking: Tensor, known: Sequence[Tensor]) -> Found:
        """One start: from the best of the first and of the ``known`` masks on, on one draw of the
        images after another. Where a draw leaves enough of them, what it pruned by chance is given
        back on the others, and the next one goes on from there."""
        agent, choice = self.config.agent, self.config.choice
        learner = self.learner(counted, ranking)
        first = self.raced(counted, self.first_masks(counted, ranking))
        start = torch.cat([first, *(mask[None] for mask in known)])
        masks, rounds = list[Tensor](), list[Round]()
        worth = 0.0
        for number, limit in enumerate((agent.rounds, *agent.further)):
            seen, unseen = self.draw(number)
            cost = self.cost(counted, seen)
            if number == 0:
                self.calibrate(cost, start)
            elite, logs = self.improved(cost, start, learner, limit)
            rounds += [replace(one, draw=number) for one in logs]
            if number == 0:
                worth = elite.worths[0]
            if len(unseen) < choice.least:
                masks[:0] = elite.masks
                break
            fresh = self.cost(counted, unseen, choice.success_weight)
            left = give_back(elite.best, fresh, choice.rounds)
            masks[:0] = [left, *elite.masks[: choice.leaders]]
            start = left[None]
        return Found(masks, worth, rounds)

    def raced(self, counted: Sequence[Contender], masks: Tensor) -> Tensor:
        """The first of the masks bool [B, S], which prunes nothing, and of the others those that
        the first few images of a search can't tell from the best; all of them where it has no more
        images than that."""
        seen, _ = self.draw(0)
        if len(seen) <= self.config.agent.raced:
            return masks
        few = seen[: self.config.agent.raced]
        others = torch.unique(masks[1:], dim=0)
        if not len(others):
            return masks[:1]
        cost = self.cost(counted, few, exact=True)
        parts = cost.parts(others)
        worths, each = cost.worth(others, parts).cpu(), cost.each(parts).cpu()
        order = worths.argsort(descending=True, stable=True)[:FINALISTS]
        best = order[0]
        errors = (each[order] - each[best]).std(1) / len(few) ** 0.5
        close = worths[best] - worths[order] <= CLOSE * errors
        close[0] = True  # whatever it is worth
        return torch.cat([masks[:1], others[order[close].sort().values]])

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Places of the clean images that are searched on in a draw, and of others that tell what
        to give back: int64 each, in turn, so that classes are as balanced as the images are."""
        images = self.config.agent.images
        order = torch.arange(len(self.clean)).roll(-number * images)
        return order[:images], order[images : images + self.config.choice.images]

    def learner(self, counted: Sequence[Contender], ranking: Tensor) -> Learner | None:
        """An agent that has seen nothing yet; None where none is to learn."""
        agent = self.config.agent
        if agent.steps == 0:
            return None
        features = self.features(counted, ranking)
        model = CautionModel(
            features.shape[1], len(self.graph.relations),
            hidden=agent.hidden, rounds=agent.messages, seed=self.seed,
        )  # fmt: skip
        device = self.evaluator.network.device
        return Learner(model, self.graph, features, agent, seed=self.seed, device=device)

    def improved(
        self, cost: Cost, start: Tensor, learner: Learner | None, limit: int
    ) -> tuple[Elite, list[Round]]:
        """What the agent makes of the masks ``start`` bool [B, S] in ``limit`` rounds at most. The
        best masks, with worths in fp32, and the rounds' logs."""
        elite, rounds = self._moved(cost, start, learner, limit)
        if self.evaluator.rough_plan is not None:
            cost.exact = True
            exact = cost.worth(torch.stack(elite.masks))
            off = abs(float(exact[0]) - elite.worths[0])
            if off <= CONFIRMED:
                confirmed = Elite(elite.capacity)
                confirmed.offer(torch.stack(elite.masks), exact)
                elite = confirmed
            else:
                log.info("the search errs by %.3f nats: it goes on in fp32", off)
                self.evaluator.rough_plan = None
                start = torch.cat([start, torch.stack(elite.masks)])
                elite, more = self._moved(cost, start, learner, limit)
                rounds = rounds + more
        return elite, rounds

    def _moved(
        self, cost: Cost, start: Tensor, learner: Learner | None, limit: int
    ) -> tuple[Elite, list[Round]]:
        """In whatever precision the cost is told."""
        ledger = self.evaluator.ledger
        elite = Elite(max(FINALISTS, self.config.choice.leaders))
        elite.offer(start, cost.worth(start))

        def tell(number: int, log: Round) -> None:
            message = f"worth {log.worth:.3f}, {log.flips} flips bring {log.gain:+.4f}"
            ledger.tick(number + 1, limit, message)

        return elite, improve(elite, cost, learner, replace(self.config.agent, rounds=limit), tell)

    def choose(self, finalists: Sequence[Tensor], counted: Sequence[Contender]) -> Choice:
        """The cheapest, on seen and unseen images: those of the first draw, those that tell what to
        give back after it, and the others, as what is known of masks there is not asked again.
        Copies have no part in it, as intervals are of images that are independent."""
        config = self.config.choice
        judged = min(config.judged, len(self.clean) - self.scene.copies)
        seen, unseen = self.draw(0)
        gave = unseen if len(unseen) >= config.least else unseen[:0]
        parts = [places[places < judged] for places in (seen, gave)]
        others = torch.ones(judged, dtype=torch.bool)
        others[torch.cat(parts)] = False
        parts.append(others.nonzero().squeeze(1))
        judges = [
            self.cost(counted, places, config.success_weight, exact=True)
            for places in parts
            if len(places)
        ]
        return choose(finalists, judges)
