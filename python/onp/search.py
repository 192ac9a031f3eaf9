"""The search for a mask on one network: everything that stays the same between its rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onp.agent.choice import Choice, choose, restore
from onp.agent.cost import Cost
from onp.agent.elite import Elite
from onp.agent.env import PruningEnv
from onp.agent.flips import FlipRound, improve
from onp.agent.gates import learn_gates
from onp.agent.policy import PruningPolicy, flip_prior
from onp.agent.ppo import UpdateLog, optimise
from onp.agent.race import Contender, heads_of
from onp.evidence import Evidence, Scene
from onp.features import node_features
from onp.graph import NeuronGraph
from onp.probes.norm_shift import NormShift, by_site
from onp.probes.responses import activation_statistics


class Search:
    """Improves masks against the counted probes; holds no mask itself."""

    def __init__(
        self, scene: Scene, graph: NeuronGraph, shift: NormShift | None, evidence: Evidence
    ) -> None:
        self.scene = scene
        self.evaluator = scene.evaluator
        self.images, self.labels = scene.images, scene.labels
        self.config, self.seed = scene.config, scene.seed
        self.graph = graph
        self.shift = shift
        self.evidence = evidence

    def features(self, counted: Sequence[Contender], gates: Tensor) -> Tensor:
        """The policy's node features, float32 [S, F]."""
        trace, evidence = self.evaluator.trace, self.evidence
        nothing = torch.zeros(trace.sites)
        return node_features(
            trace, self.scene.model, self.graph, activation_statistics(self.scene.before),
            nothing if self.shift is None else by_site(self.shift, trace),
            gates,
            nothing if evidence.unlearning is None else evidence.unlearning,
            [c.ranking for c in counted],
            [c.ranking for c in evidence.contenders if c.probe.target != evidence.verdict.target],
        )  # fmt: skip

    def cost(self, counted: Sequence[Contender], first: int, count: int) -> Cost:
        """The cost on ``count`` clean images from number ``first`` on (wrapping around)."""
        index = (torch.arange(count) + first) % len(self.images)
        probes = [contender.probe for contender in counted]
        return Cost(
            self.evaluator, self.images[index], self.labels[index], probes, self.config.cost
        )

    def gates(self, counted: Sequence[Contender]) -> Tensor:
        """The relaxed mask against the counted probes, float32 [S]."""
        return learn_gates(
            self.evaluator.network, self.images, self.labels, [c.probe for c in counted],
            torch.stack([c.ranking for c in counted]).mean(0), self.config.gates,
            seed=self.seed, ledger=self.evaluator.ledger,
        )  # fmt: skip

    def run(
        self, counted: Sequence[Contender], ranking: Tensor, known: Sequence[Tensor]
    ) -> tuple[Elite, list[FlipRound], list[UpdateLog]]:
        """From the best of the contenders' masks, their union, the heads of the gates' ranking
        float32 [S] and the ``known`` masks: single flips, then PPO."""
        agent, ledger = self.config.agent, self.evaluator.ledger
        cost = self.cost(counted, 0, min(agent.images, len(self.images)))
        union = torch.stack([contender.mask for contender in counted]).any(0)
        closed = int((ranking > 0).sum())
        heads = heads_of(ranking, [n for n in self.config.gates.counts if n <= closed])
        start = torch.stack([*(contender.mask for contender in counted), union, *heads, *known])
        elite = Elite(2 * self.config.choice.finalists)
        elite.offer(start, cost.worth(start))

        def tell_round(number: int, log: FlipRound) -> None:
            message = f"worth {log.worth:.3f}, {log.better} of {log.tried} flips help"
            ledger.tick(number + 1, self.config.flips.rounds, message)

        rounds = improve(elite, cost, self.config.flips, tell_round)
        best = elite.best
        with torch.random.fork_rng(devices=[]):  # building layers draws on the global state
            policy = PruningPolicy(
                self.graph,
                self.features(counted, ranking),
                flip_prior(ranking + 1e3 * best.float(), int(best.sum()), agent.expected_flips),
                hidden=agent.hidden,
                rounds=agent.rounds,
                generator=torch.Generator().manual_seed(self.seed),
            )
        env = PruningEnv(cost.worth, len(best), agent.copies, agent.steps)

        def tell(update: int, log: UpdateLog) -> None:
            message = f"worth {log.best:.3f}, mean reward {log.reward:+.3f}"
            ledger.tick(update + 1, agent.updates, message)

        updates = optimise(env, policy, elite, agent, seed=self.seed, report=tell)
        return elite, rounds, updates

    def choose(self, elite: Elite, counted: Sequence[Contender]) -> Choice:
        """Restore what the best masks need not prune, then pick on all clean images."""
        config = self.config.choice
        count = min(config.images, len(self.images))
        cost = self.cost(counted, len(self.images) - count, count)
        worths = cost.worth(torch.stack(elite.masks))
        order = worths.argsort(descending=True, stable=True).tolist()
        leaders = [elite.masks[i] for i in order[: config.finalists]]
        finalists = [restore(leaders[0], cost, config.rounds), *leaders]
        return choose(finalists, self.cost(counted, 0, len(self.images)))
