"""What all searches of a network start from: evidence, gates, cost. Made once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onp.agent.race import Contender
from onp.config import Config
from onp.data import ImageSet
from onp.evaluate import MaskEvaluator
from onp.evidence import RESPONSE_IMAGES, Evidence, Scene, gather, measured_shift
from onp.graph import build_graph
from onp.ledger import Ledger
from onp.prepare import baseline, clean_images, frozen_copy
from onp.probes.norm_shift import NormShift
from onp.probes.responses import activations
from onp.search import Search
from onp.suspect.trace import trace as trace_network

VALID = (0.0, 1.0)


@dataclass(frozen=True)
class Investigated:
    """A network and what speaks for a backdoor in it."""

    scene: Scene
    shift: NormShift | None
    evidence: Evidence


@dataclass(frozen=True)
class Setting:
    """A network that was called backdoored, ready to be searched."""

    search: Search
    gates: Tensor
    """float32 [S]."""

    @property
    def counted(self) -> list[Contender]:
        return self.search.evidence.counted


def investigate(model: nn.Module, clean: ImageSet, config: Config, seed: int) -> Investigated:
    """As ``onp.sanitize`` gets to its verdict."""
    images, labels = clean_images(clean, VALID, seed)
    suspect, device = frozen_copy(model, None, None)
    trace = trace_network(suspect, (images.shape[1], images.shape[2], images.shape[3]))
    evaluator = MaskEvaluator(trace, suspect, device=device, ledger=Ledger())
    seen = baseline(suspect, evaluator, images, labels)
    before = activations(evaluator.network, images[:RESPONSE_IMAGES])
    scene = Scene(suspect, evaluator, seen, before, config, VALID, seed)
    shift = measured_shift(evaluator, suspect, seen, config, valid=VALID, seed=seed)
    with torch.enable_grad():
        return Investigated(scene, shift, gather(scene, shift))


def setting_of(model: nn.Module, clean: ImageSet, config: Config, seed: int) -> Setting | None:
    """As ``onp.sanitize`` gets to its search; None where it finds no backdoor."""
    found = investigate(model, clean, config, seed)
    if found.evidence.verdict.target is None:
        return None
    graph = build_graph(found.scene.evaluator.trace, found.scene.model, config.graph)
    search = Search(found.scene, graph, found.shift, found.evidence)
    with torch.enable_grad():
        return Setting(search, search.gates(found.evidence.counted))
