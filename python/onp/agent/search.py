"""The search for a mask on one network: everything that stays the same between its rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onp.agent.choice import Choice, choose, restore
from onp.agent.env import PruningEnv
from onp.agent.objective import Objective
from onp.agent.policy import PruningPolicy, flip_prior
from onp.agent.ppo import Elite, UpdateLog, optimise
from onp.agent.race import Contender
from onp.config import Config
from onp.evaluate import MaskEvaluator
from onp.graph import NeuronGraph


class Search:
    """Improves masks against the counted probes; holds no mask itself."""

    def __init__(
        self,
        evaluator: MaskEvaluator,
        graph: NeuronGraph,
        features: Tensor,
        images: Tensor,
        labels: Tensor,
        config: Config,
        seed: int,
    ) -> None:
        """features: float32 [S, F]; images float32 [N, C, H, W] with labels int64 [N]."""
        self.evaluator = evaluator
        self.graph = graph
        self.features = features
        self.images = images
        self.labels = labels
        self.config = config
        self.seed = seed

    def objective(self, counted: Sequence[Contender], first: int, count: int) -> Objective:
        """J on ``count`` clean images from number ``first`` on (wrapping around)."""
        index = (torch.arange(count) + first) % len(self.images)
        probes = [contender.probe for contender in counted]
        return Objective(
            self.evaluator, self.images[index], self.labels[index], probes, self.config.score
        )

    def run(
        self, counted: Sequence[Contender], known: Sequence[Tensor]
    ) -> tuple[Elite, list[UpdateLog]]:
        """PPO from the best of the contenders' masks, their union and the ``known`` masks."""
        agent, ledger = self.config.agent, self.evaluator.ledger
        objective = self.objective(counted, 0, min(agent.images, len(self.images)))
        union = torch.stack([contender.mask for contender in counted]).any(0)
        start = torch.stack([*(contender.mask for contender in counted), union, *known])
        elite = Elite(2 * self.config.choice.finalists)
        elite.offer(start, objective(start).total)
        best = elite.best
        ranking = torch.stack([contender.ranking for contender in counted]).amax(0)
        with torch.random.fork_rng(devices=[]):  # building layers draws on the global state
            policy = PruningPolicy(
                self.graph,
                self.features,
                flip_prior(ranking + 1e3 * best.float(), int(best.sum()), agent.expected_flips),
                hidden=agent.hidden,
                rounds=agent.rounds,
                generator=torch.Generator().manual_seed(self.seed),
            )
        env = PruningEnv(lambda masks: objective(masks).total, len(best), agent.copies, agent.steps)

        def tell(update: int, log: UpdateLog) -> None:
            message = f"worth {log.best:.3f}, mean reward {log.reward:+.3f}"
            ledger.tick(update + 1, agent.updates, message)

        return elite, optimise(env, policy, elite, agent, seed=self.seed, report=tell)

    def choose(self, elite: Elite, counted: Sequence[Contender]) -> Choice:
        """Restore what the best masks need not prune, then pick on all clean images."""
        config = self.config.choice
        count = min(config.images, len(self.images))
        objective = self.objective(counted, len(self.images) - count, count)
        worths = objective(torch.stack(elite.masks)).total
        order = worths.argsort(descending=True, stable=True).tolist()
        leaders = [elite.masks[i] for i in order[: config.finalists]]
        finalists = [restore(leaders[0], objective, config.rounds), *leaders]
        return choose(
            finalists, self.evaluator, self.images, self.labels,
            [contender.probe for contender in counted], config,
        )  # fmt: skip
