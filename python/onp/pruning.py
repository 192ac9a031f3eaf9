"""From evidence to a mask: search, renewal, choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.agent.choice import Choice
from onp.agent.flips import Round
from onp.evidence import Evidence
from onp.graph import NeuronGraph
from onp.prepare import check_same
from onp.probes.norm_shift import NormShift, by_site
from onp.probes.race import Contender
from onp.renewal import renew
from onp.scene import Scene
from onp.search import Search
from onp.suspect.surgery import apply_mask


@dataclass(frozen=True)
class Pruning:
    """A mask, and how it came about."""

    mask: Tensor
    """bool [S]; empty where nothing was called."""
    counted: Sequence[Contender] = ()
    """The triggers that the search pruned against, renewed ones last."""
    renewed: Sequence[Contender] = ()
    """Those that got through the first mask."""
    rounds: Sequence[Round] = ()
    choice: Choice | None = None
    """Of the mask among the finalists."""


def prune(scene: Scene, graph: NeuronGraph, shift: NormShift | None, evidence: Evidence) -> Pruning:
    """Search for the mask that takes out what counts as the trigger, see whether probes still get
    through it, search on against these, and choose."""
    trace = scene.evaluator.trace
    if evidence.verdict.target is None:
        return Pruning(torch.zeros(trace.sites, dtype=torch.bool))
    search = Search(scene.with_copies(), graph, by_site(shift, trace), evidence)
    counted = list(evidence.counted)
    finalists, rounds = search.find(counted, [])
    with scene.ledger.stage("renew"):
        renewed = renew(scene, evidence, finalists[0])
    if renewed:
        counted += renewed
        finalists, more = search.find(counted, finalists)
        rounds += more
    with scene.ledger.stage("choose"):
        choice = search.choose(finalists, counted)
    return Pruning(choice.mask, counted, renewed, rounds, choice)


def applied(scene: Scene, mask: Tensor) -> tuple[nn.Module, Tensor]:
    """The suspect pruned by ``mask`` bool [S], which computes what was searched for, and which of
    the clean images are answered rightly before and after: bool [2, N]."""
    clean, evaluator = scene.clean, scene.evaluator
    after = clean.answers
    if mask.any():
        after = evaluator.run(mask[None], clean.images, exact=True)[0].argmax(1)
    pruned = apply_mask(scene.model, evaluator.trace, mask)
    check_same(pruned, evaluator, mask, clean.images, "the mask as applied")
    return pruned, torch.stack([clean.answers, after]) == clean.labels
