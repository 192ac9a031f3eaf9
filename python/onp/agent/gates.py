"""The relaxed mask: a gate in [0, 1] for every site, learned by gradient descent.

A mask's worth says nothing until enough of a backdoor's channels are gone together; the gradient
sees each of them. The gates give the search a ranking and its first masks; what is pruned is
decided on masks alone.

    loss = mean softplus(target's logit - the others' log-sum-exp) on triggered images
           + clean_weight * (cross-entropy + KL(original || gated)) on clean images
           + sum over the sites of price / response * (1 - gate)

A site that the trigger hardly moves (response: change of its activation over its layer's mean)
costs more to close: what serves the target class on clean images too is not what was planted.

ANP (Wu & Wang, NeurIPS 2021) and RNP (Li et al., ICML 2023) learn masks of this kind against
perturbed weights and an unlearned network; here the counted probes stand for the trigger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.clean import Clean
from onp.config import GatesConfig
from onp.ledger import Ledger
from onp.optimizers import Adam
from onp.probes.probe import Trigger
from onp.suspect.network import FrozenNetwork


def learn_gates(
    network: FrozenNetwork,
    clean: Clean,
    probes: Sequence[Trigger],
    response: Tensor,
    config: GatesConfig,
    *,
    seed: int,
    ledger: Ledger,
) -> Tensor:
    """How far each site's gate has closed, float32 [S], 0 where it has not.

    response: float32 [S], to the probes. Costs 2 image-forwards an image and step.
    """
    images, labels = clean.images, clean.labels
    device, random = network.device, torch.Generator().manual_seed(seed)
    gates = torch.ones(network.trace.sites, device=device, requires_grad=True)
    optimizer = Adam(([gates], config.learning_rate), betas=(0.9, 0.99))
    draw = config.images_per_step
    each = -(-draw // len(probes))
    others = [(labels != probe.wanted(labels)).nonzero().squeeze(1) for probe in probes]
    original = clean.original.to(device)
    price = config.price / response.to(device).clamp(*config.responses)
    closed = torch.zeros_like(gates)  # summed over the steps: tells apart what ended alike
    for step in range(config.steps):
        kept = torch.randint(len(images), (draw,), generator=random)
        hit = [o[torch.randint(len(o), (each,), generator=random)] for o in others]
        triggered = [p(images[index]) for p, index in zip(probes, hit, strict=True)]
        answers = [p.wanted(labels[index]) for p, index in zip(probes, hit, strict=True)]
        wanted = torch.cat(answers).to(device)[:, None]
        logits = network(torch.cat([images[kept], *triggered]), gates)
        logs = logits[:draw].log_softmax(1)
        before = original[kept.to(device)]
        harm = F.nll_loss(logs, labels[kept].to(device)) + F.kl_div(
            logs, before, log_target=True, reduction="batchmean"
        )
        own = logits[draw:].gather(1, wanted).squeeze(1)
        rest = logits[draw:].scatter(1, wanted, -torch.inf).logsumexp(1)
        loss = F.softplus(own - rest).mean() + config.clean_weight * harm
        loss = loss + (price * (1 - gates)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
            closed += (1 - gates) / config.steps
        ledger.count(2 * len(logits))
        ledger.tick(step + 1, config.steps)
    return ((1 - gates.detach()) + 1e-3 * closed).cpu()
