"""The search for a mask on one network: everything that stays the same between its rounds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onp.agent.caution import CautionModel
from onp.agent.choice import Choice, choose
from onp.agent.cost import Cost
from onp.agent.effects import flip_effects
from onp.agent.elite import Elite
from onp.agent.flips import Round, give_back, improve
from onp.agent.gates import learn_gates
from onp.agent.learner import Learner
from onp.agent.race import Contender, heads_of
from onp.agent.relaxed import RelaxedCost
from onp.agent.state import State
from onp.agent.weights import load_policy
from onp.evidence import Evidence, Scene
from onp.features import node_features
from onp.graph import NeuronGraph
from onp.probes.probe import Probe, Strengthened, Trigger
from onp.probes.responses import activation_statistics

log = logging.getLogger("onp")

SEEDS_APART = 101
"""Seeds of the gates of one start and the next."""

CALIBRATION_IMAGES = 64
"""Clean and triggered ones that an 8-bit search is calibrated on."""
CONFIRMED = 0.05
"""Nats by which the worth of its best mask may be off what fp32 says, or it goes on in fp32."""


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

    def features(self, counted: Sequence[Contender], gates: Tensor) -> Tensor:
        """The node features, float32 [S, F]."""
        trace, evidence = self.evaluator.trace, self.evidence
        nothing = torch.zeros(trace.sites)
        return node_features(
            trace, self.scene.model, self.graph, activation_statistics(self.scene.before),
            self.norm_shift,
            gates,
            nothing if evidence.unlearning is None else evidence.unlearning,
            [c.ranking for c in counted],
            [c.ranking for c in evidence.contenders if c.probe.target != evidence.verdict.target],
        )  # fmt: skip

    def cost(
        self,
        counted: Sequence[Contender],
        images: slice,
        success_weight: float | None = None,
        exact: bool = False,
    ) -> Cost:
        """The cost on a part of the clean images."""
        config = self.config.cost
        if success_weight is not None:
            config = replace(config, success_weight=success_weight)
        triggers = [self._trigger(contender.probe) for contender in counted]
        reached = [contender.success for contender in counted]
        return Cost(self.evaluator, self.clean[images], triggers, config, exact, reached)

    def _trigger(self, probe: Probe) -> Trigger:
        """What stands for the attacker's trigger: a replayed one at several strengths, as how much
        of it the norms remember hangs on the share of poisoned images, which is not known. A shift
        of labels needs the image left as it is."""
        if self.evidence.verdict.by == "norm statistics" and isinstance(probe.target, int):
            return Strengthened(probe, self.config.cost.strengths)
        return probe

    def calibrate(self, cost: Cost, start: Tensor) -> None:
        """Let the cost be told in 8 bits, if that is configured: with ranges of the first and the
        last of the masks bool [B, S] that the search starts from, as what they prune moves values
        too far for ranges that have not seen it."""
        if self.config.search_in_8_bits:
            ends = start[:: max(1, len(start) - 1)]
            self.evaluator.calibrate(ends, cost.sample(CALIBRATION_IMAGES))

    def relaxed(self, counted: Sequence[Contender]) -> RelaxedCost:
        """The cost of gates."""
        return RelaxedCost(
            self.evaluator.network, self.clean, [c.probe for c in counted],
            torch.stack([c.ranking for c in counted]).mean(0), self.config.gates,
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

    def gates(self, counted: Sequence[Contender], number: int = 0) -> Tensor:
        """The relaxed mask against the counted probes, float32 [S]: how far each gate closes, as
        the policy proposes and descent adapts it to this network. number: of the start; each draws
        images of its own."""
        config = self.config.gates
        start = torch.ones(self.evaluator.trace.sites)
        steps, rate = config.steps, config.learning_rate
        if config.policy is not None:
            start = start - self.proposal(counted, config.policy)
            steps, rate = config.adapted_steps, config.adapted_rate
        return learn_gates(
            self.relaxed(counted), start, steps=steps, learning_rate=rate,
            seed=self.seed + SEEDS_APART * number, ledger=self.evaluator.ledger,
        )  # fmt: skip

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
        """The best masks, bool [S] each, and the rounds' logs: gates are learned and the agent goes
        on from there, and again from other gates, as long as what was found is dear."""
        agent, ledger = self.config.agent, self.evaluator.ledger
        best, rounds = Elite(self.config.choice.leaders), list[Round]()
        for number in range(agent.starts):
            with ledger.stage("gates"):
                gates = self.gates(counted, number)
            with ledger.stage("agent"):
                found, more = self.run(counted, gates, known)
            best.offer(torch.stack(found.masks), torch.tensor(found.worths))
            rounds += [replace(one, start=self.starts) for one in more]
            self.starts += 1
            if best.worths[0] >= -agent.dear:
                break
            log.info("the best mask of start %d costs %.3f nats", number + 1, -best.worths[0])
        return best.masks, rounds

    def run(
        self, counted: Sequence[Contender], ranking: Tensor, known: Sequence[Tensor]
    ) -> tuple[Elite, list[Round]]:
        """One start: from the best of the first and of the ``known`` masks on. The best masks, with
        worths in fp32, and the rounds' logs."""
        first = self.first_masks(counted, ranking)
        cost = self.cost(counted, slice(self.config.agent.images))
        self.calibrate(cost, first)
        start = torch.cat([first, *(mask[None] for mask in known)])
        elite, rounds = self._improved(cost, start, counted, ranking)
        if self.evaluator.byte_plan is not None:
            cost.exact = True
            exact = cost.worth(torch.stack(elite.masks))
            off = abs(float(exact[0]) - elite.worths[0])
            if off <= CONFIRMED:
                confirmed = Elite(elite.capacity)
                confirmed.offer(torch.stack(elite.masks), exact)
                elite = confirmed
            else:
                log.info("8 bits err by %.3f nats: the search goes on in fp32", off)
                self.evaluator.byte_plan = None
                start = torch.cat([start, torch.stack(elite.masks)])
                elite, more = self._improved(cost, start, counted, ranking)
                rounds = rounds + more
        return elite, rounds

    def _improved(
        self, cost: Cost, start: Tensor, counted: Sequence[Contender], ranking: Tensor
    ) -> tuple[Elite, list[Round]]:
        """What an agent of its own makes of the masks ``start`` bool [B, S]."""
        agent, ledger = self.config.agent, self.evaluator.ledger
        elite = Elite(self.config.choice.leaders)
        elite.offer(start, cost.worth(start))
        features = self.features(counted, ranking)
        model = CautionModel(
            features.shape[1], len(self.graph.relations),
            hidden=agent.hidden, rounds=agent.messages, seed=self.seed,
        )  # fmt: skip

        def tell(number: int, log: Round) -> None:
            message = f"worth {log.worth:.3f}, {log.better} of {log.tried} moves help"
            ledger.tick(number + 1, agent.rounds, message)

        learner = Learner(model, self.graph, features, agent, seed=self.seed, device=cost.device)
        return elite, improve(elite, cost, learner, agent, tell)

    def choose(self, finalists: Sequence[Tensor], counted: Sequence[Contender]) -> Choice:
        """Give back what images that the search has not seen do not need pruned, then take what is
        cheapest on seen and unseen ones."""
        config, seen = self.config.choice, self.config.agent.images
        weight = config.success_weight
        if len(self.clean) - seen >= config.least:
            fresh = self.cost(counted, slice(seen, seen + config.images), weight)
            finalists = [give_back(finalists[0], fresh, config.rounds), *finalists]
        return choose(finalists, self.cost(counted, slice(config.judged), weight, exact=True))
