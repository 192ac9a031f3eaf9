"""The ceiling: the search of the package, told the trigger. No defence; nobody who repairs has it.

It says how much of what a defence loses may be the network's fault: its backdoor may share channels
with what the network is for, so that no mask removes the one and keeps the other. It takes more
steps of gates and more rounds than the standard budget, and is no bound: a better search may find
more.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.defences.api import Info
from bench.defences.common import device_of, traced
from bench.zoo.attacks import Attack
from onp.agent.cost import Cost
from onp.agent.elite import Elite
from onp.agent.flips import improve
from onp.agent.gates import learn_gates
from onp.agent.relaxed import RelaxedCost
from onp.clean import Clean
from onp.config import AgentConfig, CostConfig, GatesConfig
from onp.data import ImageSet, spread_order
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.masks import heads_of
from onp.probes.responses import activations, responses
from onp.suspect.surgery import apply_mask

KNOWN_TRIGGER = "known-trigger"
"""What its rows are called."""
RESPONSE_IMAGES = 64
GATES = GatesConfig(steps=120, images_per_step=48, learning_rate=0.05)
SEARCH = AgentConfig(rounds=32, pool=128, little=0.0005, patience=4)
_BATCH = 250


@dataclass(frozen=True)
class KnownProbe:
    """The attack in the place of a synthesised trigger."""

    attack: Attack

    def wanted(self, labels: Tensor) -> Tensor:
        return self.attack.answers(labels)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.attack(part) for part in images.split(_BATCH)])


def known_trigger(
    model: nn.Module, clean: ImageSet, *, attack: Attack, seed: int, ledger: Ledger
) -> tuple[nn.Module, Info]:
    """The best mask that gates and search find against the attack itself."""
    suspect = copy.deepcopy(model).float().eval()
    trace = traced(suspect, clean)
    evaluator = MaskEvaluator(trace, suspect, device=device_of(suspect), ledger=ledger)
    drawn = clean[spread_order(clean.labels, seed)]
    images, labels = drawn.floats(), drawn.labels
    probes = [KnownProbe(part) for part in attack.parts]
    seen = images[:RESPONSE_IMAGES]
    before = activations(evaluator.network, seen)
    changed = [responses(before, evaluator.network, probe(seen), ledger) for probe in probes]
    response = torch.stack(changed).mean(0)
    known = Clean.seen_by(evaluator, images, labels)
    gates = learn_gates(
        RelaxedCost(evaluator.network, known, probes, response, GATES), torch.ones(trace.sites),
        steps=GATES.steps, learning_rate=GATES.learning_rate, seed=seed, ledger=ledger,
    )  # fmt: skip
    weighed = CostConfig(success_weight=1.5)  # the yardstick's own, whatever a repair's is
    cost = Cost(evaluator, known[: SEARCH.images], probes, weighed)
    nothing = torch.zeros(1, trace.sites, dtype=torch.bool)
    closed = int((gates > 0).sum())
    heads = heads_of(gates, [count for count in GATES.counts if count <= closed])
    first = torch.cat([nothing, heads, heads_of(response, GATES.counts)])
    elite = Elite(5)
    elite.offer(first, cost.worth(first))
    rounds = improve(elite, cost, None, SEARCH)
    mask = elite.best
    settings = {"pruned": int(mask.sum()), "sites": trace.sites, "rounds": len(rounds)}
    return apply_mask(suspect, trace, mask), Info("told the trigger", settings)
