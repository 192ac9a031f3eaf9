"""The plain probe race: synthesised triggers rank channels, the best head of a ranking is pruned.

No learning at all; the baseline that the package's own agent has to beat. It has no gate for clean
networks: it prunes always, and harms a network that carries no backdoor.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from bench.defences.api import Info, defence
from bench.defences.common import FORWARD, device_of, traced
from onp.config import UnlearningConfig
from onp.data import ImageSet, spread_order
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.probes.probe import Probe
from onp.probes.race import ranking_masks
from onp.probes.responses import activations, responses
from onp.probes.synthesis import synthesise
from onp.probes.unlearning import unlearn
from onp.suspect.surgery import apply_mask
from onp.suspect.trace import Trace

PROBE_SHARE = 0.7
"""Of the clean images (350 of 500), for unlearning and synthesis; the rest judge the masks."""
CLASSES = 2
"""The commonest answers after unlearning that are probed."""
STEPS, DRAW = 60, 128
"""Steps of the synthesis, and images that each trigger sees in one: all, where there are fewer."""
RESPONSE_IMAGES = 128
"""Images that the ranking by a probe is taken on."""
SHARES = (0.003, 0.005, 0.01, 0.015, 0.02, 0.03)
"""Shares of the channels that a ranking's masks prune."""
ACCURACY_WEIGHT = 3.0
"""Probe success that one unit of clean accuracy is worth."""


@defence("probe-race")
def probe_race(
    model: nn.Module,
    clean: ImageSet,
    *,
    seed: int,
    ledger: Ledger,
    steps: int = STEPS,
    draw: int = DRAW,
) -> tuple[nn.Module, Info]:
    """Race the masks of every probe, restore what need not be pruned, and apply the winner.

    4 families x 2 classes x 6 sizes = 48 masks, each judged by its own probe. Candidates: the best
    mask of each probe, as raced.
    """
    suspect = copy.deepcopy(model).float().eval()
    trace = traced(suspect, clean)
    evaluator = MaskEvaluator(trace, suspect, device=device_of(suspect), ledger=ledger)
    order = spread_order(clean.labels, seed)
    cut = round(PROBE_SHARE * len(clean))
    seen, held_back = clean[order[:cut]], clean[order[cut:]]
    images, labels = seen.floats(), seen.labels

    unlearned = unlearn(suspect, images, labels, UnlearningConfig(), seed=seed, ledger=ledger)
    probes = synthesise(
        evaluator.network, images, labels, unlearned.suspects(CLASSES),
        steps=steps, draw=min(draw, len(images)), valid=(0.0, 1.0), seed=seed, ledger=ledger,
    )  # fmt: skip
    some = images[:RESPONSE_IMAGES]
    before = activations(evaluator.network, some)
    ledger.count(FORWARD * len(some))

    best: tuple[float, Tensor, Judge] | None = None
    raced = []
    for probe in probes:
        ranking = responses(before, evaluator.network, probe(some), ledger)
        judge = Judge(evaluator, held_back, probe)
        masks = ranking_masks(_prunable(trace, ranking), SHARES)
        scores = judge(masks)
        place = int(scores.argmax())
        raced.append((float(scores[place]), probe.name, masks[place]))
        if best is None or raced[-1][0] > best[0]:
            best = (raced[-1][0], masks[place], judge)
    assert best is not None
    mask = restore(best[1], best[2])
    info = Info(
        schedule="the project's own baseline",
        settings={
            "probe": best[2].probe.name,
            "score": round(best[0], 4),
            "pruned_before_restoring": int(best[1].sum()),
            "pruned": int(mask.sum()),
            "sites": trace.sites,
            "unlearned_answers": unlearned.answers.tolist(),
        },
        candidates=[
            (f"{name}, score {score:.2f}", partial(apply_mask, suspect, trace, pruned))
            for score, name, pruned in sorted(raced, key=lambda row: -row[0])
        ],
    )
    return apply_mask(suspect, trace, mask), info


class Judge:
    """How good a mask is by one probe: the drop of its success - 3 * the loss of clean accuracy."""

    def __init__(self, evaluator: MaskEvaluator, held_back: ImageSet, probe: Probe) -> None:
        self.evaluator = evaluator
        self.probe = probe
        clean = held_back.floats()
        others = held_back.labels != probe.target
        self.labels = held_back.labels
        self.images = torch.cat([clean, probe(clean[others])])
        nothing = torch.zeros(1, evaluator.trace.sites, dtype=torch.bool)
        accuracy, success = self._measure(nothing)
        self.accuracy, self.success = float(accuracy), float(success)

    def __call__(self, masks: Tensor) -> Tensor:
        """Scores float32 [B] of masks bool [B, S]; 1 is a free and complete repair."""
        accuracy, success = self._measure(masks)
        return (self.success - success) - ACCURACY_WEIGHT * (self.accuracy - accuracy)

    def _measure(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Clean accuracy and success of the probe, float32 [B] each."""
        answers = self.evaluator.run(masks, self.images).argmax(2)
        count = len(self.labels)
        accuracy = (answers[:, :count] == self.labels).float().mean(1)
        return accuracy, (answers[:, count:] == self.probe.target).float().mean(1)


def restore(mask: Tensor, judge: Judge) -> Tensor:
    """Give back, one by one, every pruned site whose return does not lower the score."""
    best = float(judge(mask[None]))
    for site in mask.nonzero().squeeze(1).tolist():
        trial = mask.clone()
        trial[site] = False
        score = float(judge(trial[None]))
        if score >= best:
            mask, best = trial, score
    return mask


def _prunable(trace: Trace, ranking: Tensor) -> Tensor:
    """The ranking with sites that have no norm of their own left out, where any have one: the
    baseline prunes norm channels."""
    normed = torch.cat(
        [torch.full((layer.channels,), layer.norm is not None) for layer in trace.layers]
    )
    if not bool(normed.any()):
        return ranking
    return torch.where(normed, ranking, torch.full_like(ranking, -1.0))
