"""The relaxed mask: a gate in [0, 1] for every site, learned by gradient descent.

A mask's worth says nothing until enough of a backdoor's channels are gone together; the gradient
sees each of them. The gates give the search a ranking and its first masks; what is pruned is
decided on masks alone.

ANP (Wu & Wang, NeurIPS 2021) and RNP (Li et al., ICML 2023) learn masks of this kind against
perturbed weights and an unlearned network; here the counted probes stand for the trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onp.agent.relaxed import RelaxedCost
from onp.ledger import Ledger
from onp.optimizers import Adam


def learn_gates(
    cost: RelaxedCost, start: Tensor, *, steps: int, learning_rate: float, seed: int, ledger: Ledger
) -> Tensor:
    """How far each site's gate has closed, float32 [S], 0 where it has not.

    start: the gates to begin with, float32 [S]. Costs 2 image-forwards an image and step.
    """
    random = torch.Generator().manual_seed(seed)
    gates = start.to(cost.network.device).clone().requires_grad_(True)
    optimizer = Adam(([gates], learning_rate), betas=(0.9, 0.99))
    closed = torch.zeros_like(gates)  # summed over the steps: tells apart what ended alike
    for step in range(steps):
        loss = cost(gates, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
            closed += (1 - gates) / steps
        ledger.count(2 * cost.images)
        ledger.tick(step + 1, steps)
    return ((1 - gates.detach()) + 1e-3 * closed).cpu()
