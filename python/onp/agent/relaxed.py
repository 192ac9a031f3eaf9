"""What gates in [0, 1] cost: the relaxed form of a mask's cost, for descent.

    mean softplus(target's logit - the others' log-sum-exp) on triggered images
    + clean_weight * (cross-entropy + KL(original || gated)) on clean images
    + sum over the sites of price / response * (1 - gate)

A site that the trigger hardly moves (response: change of its activation over its layer's mean)
costs more to close: what serves the target class on clean images too is not what was planted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.answers import harm, margin
from onp.clean import Clean
from onp.config import GatesConfig
from onp.probes.probe import Probe, Trigger
from onp.suspect.network import FrozenNetwork


class RelaxedCost:
    """On clean images drawn at random, and on others triggered by the probes."""

    def __init__(
        self,
        network: FrozenNetwork,
        clean: Clean,
        probes: Sequence[Trigger],
        response: Tensor,
        config: GatesConfig,
    ) -> None:
        """response: float32 [S], to the probes."""
        self.network, self.config = network, config
        self.probes = [p.to(network.device) if isinstance(p, Probe) else p for p in probes]
        self.clean = clean.to(network.device)
        self.response = response
        device, labels = network.device, clean.labels.cpu()
        self.sites = network.trace.sites
        self.price = config.price / response.to(device).clamp(*config.responses)
        self.others = [(labels != probe.wanted(labels)).nonzero().squeeze(1) for probe in probes]
        """Images that each probe would turn."""
        draw = config.images_per_step
        self.each = -(-draw // len(probes))
        self.images = draw + self.each * len(probes)
        """Image-forwards of one call, twice that with its gradient."""

    def __call__(self, gates: Tensor, random: torch.Generator) -> Tensor:
        """Of gates float32 [S] on the network's device, with a gradient; in nats."""
        images, labels = self.clean.images, self.clean.labels
        device, draw = self.network.device, self.config.images_per_step
        kept = torch.randint(len(images), (draw,), generator=random).to(device)
        hit = [
            o[torch.randint(len(o), (self.each,), generator=random)].to(device) for o in self.others
        ]
        with torch.no_grad():
            pairs = list(zip(self.probes, hit, strict=True))
            triggered = [probe(images[index]) for probe, index in pairs]
            wanted = torch.cat([probe.wanted(labels[index]) for probe, index in pairs])
        logits = self.network(torch.cat([images[kept], *triggered]), gates)
        logs = logits[:draw].log_softmax(1)
        moved = harm(logs, labels[kept], self.clean.original[kept])
        turned = F.softplus(margin(logits[draw:], wanted)).mean()
        return turned + self.config.clean_weight * moved + (self.price * (1 - gates)).sum()
