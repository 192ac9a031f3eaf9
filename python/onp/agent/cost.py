"""What a mask costs, from clean images and probes alone; search and final choice minimise it.

    cost(m) = mean over the images of
                cross-entropy over the original's + KL(original || masked), on the clean image
                - weight * log(1 - excess probability of the target), on the image triggered

in nats an image. The divergence tells masks apart where the label alone cannot: on a few hundred
images some mask of many is always right by luck, but it does not answer as the original did. The
logarithm makes an image that the trigger turns for sure cost more than many that it makes doubtful:
the first is what a backdoor does, the others what natural directions do to every network. The
weight is success_weight / sqrt(q) for a trigger that adds a probability q on average before
anything is pruned: an attacker's adds nearly 1, so one that adds little understates what is left.
Where a trigger is after the images of one class alone these weigh as much as all would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.answers import margin
from onp.clean import Clean
from onp.config import CostConfig
from onp.evaluate import MaskEvaluator
from onp.probes.probe import Trigger, after_one_class

SUREST = 0.98
"""Share of the excess probability that is counted, so that its logarithm stays finite: 3.9 nats."""
WORTHLESS = -1e6
"""Worth of a mask under which an answer is not a number."""
LEAST_REACHED = 1 / 3
"""A trigger that adds less probability counts as if it added so much."""


@dataclass(frozen=True)
class Parts:
    """The cost of B masks image by image, float32 [B, N] each, on the network's device."""

    harm: Tensor
    """Cross-entropy added and divergence, in nats."""
    success: Tensor
    """Probability of the target that the trigger adds; 0 where it is the image's own label."""
    turned: Tensor
    """Weighted nats of the target's probability on the triggered image, -log(1 - p), uncapped and
    not in excess; 0 where it is the label. What the model of the margins foresees."""

    def gains(self, present: Parts) -> Tensor:
        """What every mask gains over the one mask of ``present``, on clean and on triggered images:
        float32 [2, B]."""
        before, after = (
            torch.stack([parts.harm.mean(1), parts.turned.mean(1)]) for parts in (present, self)
        )
        return before - after


Told = dict[tuple[bool, bytes], Tensor]
"""What is known of single masks, parts before the weight, float32 [3, N]: by whether it was told in
fp32, and by the mask."""


class Cost:
    """The cost on a fixed set of clean images, each also triggered by one of the probes. No mask is
    asked for twice in the same precision."""

    def __init__(
        self,
        evaluator: MaskEvaluator,
        clean: Clean,
        probes: Sequence[Trigger],
        config: CostConfig,
        exact: bool = False,
        reached: Sequence[float] | None = None,
        told: Told | None = None,
        factors: Sequence[float] | None = None,
    ) -> None:
        """exact: in fp32, and not as rough as the evaluator may be for a search. reached: mean
        probability of its target that each probe adds, nothing pruned; default: 1. told: of another
        cost on the same images and probes, to which this one adds. factors: of the weights of each
        probe's images; default: 1."""
        self.device = evaluator.network.device
        clean = clean.to(self.device)
        images, labels = clean.images, clean.labels
        self.evaluator = evaluator
        self.config = config
        self.exact = exact
        self.told: Told = {} if told is None else told
        self.sites = evaluator.trace.sites
        self.images, self.labels = images, labels
        self.hands = dealt_out(len(images), len(probes))
        """Which of the images each probe triggers."""
        self.triggered, self.wanted = torch.empty_like(images), torch.empty_like(labels)
        self.weight = torch.full((len(images),), config.success_weight, device=self.device)
        """Of a nat on each triggered image, float32 [N]; 0 where the trigger wants the label."""
        reached = [1.0] * len(probes) if reached is None else reached
        factors = [1.0] * len(probes) if factors is None else factors
        for probe, hand, share, factor in zip(probes, self.hands, reached, factors, strict=True):
            self.triggered[hand] = probe(images[hand])
            self.wanted[hand] = probe.wanted(labels[hand])
            self.weight[hand] *= factor
            self.weight[hand] /= max(LEAST_REACHED, share) ** 0.5
            if after_one_class(probe):
                after = self.wanted[hand] != labels[hand]
                self.weight[hand] *= len(hand) / after.sum().clamp_min(1)
        self.weight *= self.wanted != labels
        self.both = torch.cat([images, self.triggered])
        self.original = clean.original

    def parts(self, pruned: Tensor) -> Parts:
        """Of masks bool [B, S]; one engine call for all that were not asked for before."""
        names = self._names(pruned)
        new = {name: row for row, name in enumerate(names) if name not in self.told}
        if new:
            self.told.update(zip(new, self._ask(pruned[list(new.values())]), strict=True))
        none = self.weight.new_empty(0, 3, len(self.images))
        told = torch.cat([none, *(self.told[name][None] for name in names)])
        harm, success, turned = told.unbind(1)
        return Parts(harm, success, self.weight * turned)

    @property
    def trusts_gradients(self) -> bool:
        """Whether what a gradient sees of a mask is what the engine would say: not where that is
        rougher, or more exact, than gradients are."""
        rough = self.evaluator.rough_plan is not None
        return not rough and (self.device.type == "cpu" or not self.exact)

    def saw(self, mask: Tensor, clean: Tensor, hit: Tensor) -> None:
        """Take in what a gradient saw of a mask bool [S], which then is not asked for: logits
        float32 [N, K] on clean and on triggered images. What the engine said stands, and is asked
        for where an answer is no number: it cuts off what a gate of 0 multiplies."""
        if not self.trusts_gradients:
            return
        (name,) = self._names(mask[None])
        judged = self._judged(clean[None], hit[None])[0]
        if bool(judged.isfinite().all()):
            self.told.setdefault(name, judged)

    def _names(self, pruned: Tensor) -> list[tuple[bool, bytes]]:
        fp32 = self.exact or self.evaluator.precision == "fp32"
        return [(fp32, mask.numpy().tobytes()) for mask in pruned.cpu()]

    def _ask(self, pruned: Tensor) -> Tensor:
        """Parts before the weight, float32 [B, 3, N]."""
        logits = self.evaluator.run(
            pruned, self.both, exact=self.exact, rough=not self.exact, stay=True
        )
        clean, hit = logits.split(len(self.images), 1)
        return self._judged(clean, hit)

    def _judged(self, clean: Tensor, hit: Tensor) -> Tensor:
        """The same from logits float32 [B, N, K]."""
        masks = len(clean)
        labels = self.labels.expand(masks, -1)[..., None]
        wanted = self.wanted.expand(masks, -1)[..., None]
        logs = clean.log_softmax(2)
        entropy = (self.original - logs).gather(2, labels).squeeze(2)
        divergence = (self.original.exp() * (self.original - logs)).sum(2)
        excess = (hit.softmax(2) - logs.exp()).gather(2, wanted).squeeze(2).clamp_min(0)
        turned = F.softplus(margin(hit, wanted.squeeze(2)))
        success = excess * (self.wanted != self.labels)
        return torch.stack([entropy + divergence, success, turned], 1)

    def sample(self, count: int) -> Tensor:
        """``count`` of the images, clean and triggered ones alike: float32 [n, C, H, W]."""
        count = min(count, len(self.both))
        return self.both[torch.linspace(0, len(self.both) - 1, count).long()]

    def worth(self, pruned: Tensor, parts: Parts | None = None) -> Tensor:
        """Minus the cost, minus the price of every pruned site: float32 [B]; of masks whose
        ``parts`` are known without asking the engine. On the network's device."""
        parts = self.parts(pruned) if parts is None else parts
        sites = pruned.sum(1).float().to(self.device)
        worth = -self.each(parts).mean(1) - self.config.price * sites
        return worth.nan_to_num(nan=WORTHLESS)

    def each(self, parts: Parts) -> Tensor:
        """The cost image by image, float32 [B, N]."""
        return parts.harm + self.of_success(parts.success)

    def of_success(self, success: Tensor) -> Tensor:
        """What a triggered image costs by the probability of the target that the trigger adds."""
        return -self.weight * torch.log1p(-SUREST * success)


def dealt_out(count: int, hands: int) -> list[Tensor]:
    """The numbers 0 .. count - 1, shuffled (always alike: images come with their classes in turn),
    dealt out in ``hands`` parts, int64 each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [order[hand::hands].sort().values for hand in range(hands)]
