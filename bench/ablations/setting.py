"""What all searches of a network start from: evidence, gates, cost. Made once, kept if asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from onp.agent.race import Contender
from onp.config import Config
from onp.data import ImageSet
from onp.evaluate import MaskEvaluator
from onp.evidence import RESPONSE_IMAGES, Evidence, Scene, gather
from onp.files import write_atomically
from onp.graph import NeuronGraph, build_graph
from onp.ledger import Ledger
from onp.prepare import clean_images, frozen_copy
from onp.probes.norm_shift import NormShift, norm_shift
from onp.probes.responses import activations
from onp.search import Search
from onp.suspect.trace import trace as trace_network

VALID = (0.0, 1.0)


@dataclass(frozen=True)
class Gathered:
    """What took long to find out about a network."""

    shift: NormShift | None
    evidence: Evidence
    gates: Tensor | None
    """float32 [S]; None where no backdoor was found."""


@dataclass(frozen=True)
class Setting:
    """A network that was called backdoored, ready to be searched."""

    search: Search
    gates: Tensor
    """float32 [S]."""

    @property
    def counted(self) -> list[Contender]:
        return self.search.evidence.counted


def setting_of(
    model: nn.Module, clean: ImageSet, config: Config, seed: int, kept: Path | None = None
) -> Setting | None:
    """As ``onp.sanitize`` gets there; None where it finds no backdoor.

    kept: file of a ``Gathered``, read if it is there and written if it is not. It is a pickle of
    one's own and is trusted: delete it when the model, the data or the evidence's code change.
    """
    images, labels = clean_images(clean, VALID, seed)
    suspect, device = frozen_copy(model, None, None)
    trace = trace_network(suspect, (images.shape[1], images.shape[2], images.shape[3]))
    evaluator = MaskEvaluator(trace, suspect, device=device, ledger=Ledger())
    graph = build_graph(trace, suspect, config.graph)
    before = activations(evaluator.network, images[:RESPONSE_IMAGES])
    scene = Scene(suspect, evaluator, images, labels, before, config, VALID, seed)
    if kept is not None and kept.exists():
        gathered = torch.load(kept, weights_only=False)
        assert isinstance(gathered, Gathered)
    else:
        gathered = _gather(scene, graph)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, lambda path: torch.save(gathered, path))
    if gathered.gates is None:
        return None
    return Setting(Search(scene, graph, gathered.shift, gathered.evidence), gathered.gates)


def _gather(scene: Scene, graph: NeuronGraph) -> Gathered:
    shift = norm_shift(
        scene.evaluator.network, scene.model, scene.images, scene.labels,
        valid=VALID, seed=scene.seed, ledger=scene.ledger,
    )  # fmt: skip
    with torch.enable_grad():
        evidence = gather(scene, shift)
        if evidence.verdict.target is None:
            return Gathered(shift, evidence, None)
        search = Search(scene, graph, shift, evidence)
        return Gathered(shift, evidence, search.gates(evidence.counted))
