"""What all ablations of a network share: evidence, gates, first masks, cost. Made once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.agent.race import Contender
from onp.config import Config
from onp.data import ImageSet
from onp.evaluate import MaskEvaluator
from onp.evidence import RESPONSE_IMAGES, Scene, gather
from onp.graph import build_graph
from onp.ledger import Ledger
from onp.prepare import clean_images, frozen_copy
from onp.probes.norm_shift import norm_shift
from onp.probes.responses import activations
from onp.search import Search
from onp.suspect.trace import trace as trace_network

VALID = (0.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """A network that was called backdoored, ready to be searched."""

    search: Search
    counted: list[Contender]
    gates: Tensor
    """float32 [S]."""


def setting_of(model: nn.Module, clean: ImageSet, config: Config, seed: int) -> Setting | None:
    """As ``onp.sanitize`` gets there; None where it finds no backdoor."""
    images, labels = clean_images(clean, VALID, seed)
    suspect, device = frozen_copy(model, None, None)
    trace = trace_network(suspect, (images.shape[1], images.shape[2], images.shape[3]))
    ledger = Ledger()
    evaluator = MaskEvaluator(trace, suspect, device=device, ledger=ledger)
    graph = build_graph(trace, suspect, config.graph)
    before = activations(evaluator.network, images[:RESPONSE_IMAGES])
    shift = norm_shift(
        evaluator.network, suspect, images, labels, valid=VALID, seed=seed, ledger=ledger
    )
    scene = Scene(suspect, evaluator, images, labels, before, config, VALID, seed)
    with torch.enable_grad():
        evidence = gather(scene, shift)
        if evidence.verdict.target is None:
            return None
        search = Search(scene, graph, shift, evidence)
        return Setting(search, evidence.counted, search.gates(evidence.counted))
