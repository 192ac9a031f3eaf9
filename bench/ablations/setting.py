"""What all searches of a network start from: evidence, gates, cost. Made once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.zoo.checkpoints import ZooModel
from onp import __version__
from onp.config import BUDGETS, Config
from onp.data import ImageSet, draw_balanced
from onp.evidence import Evidence, gather, measured_shift
from onp.evidence.found import Unlearning
from onp.files import write_atomically
from onp.graph import build_graph
from onp.ledger import Ledger
from onp.prepare import opened
from onp.probes.margin import Margins
from onp.probes.norm_shift import by_site
from onp.probes.probe import LabelShift, OneClass, Probe
from onp.probes.race import Contender
from onp.probes.roaming import Roaming
from onp.probes.square import Square
from onp.scene import REPLAYED, Scene, Squares
from onp.search import Search
from onp.verdict import Verdict

_KEPT = [
    Evidence, Unlearning, Verdict, Contender, Probe, LabelShift, OneClass, Square, Squares,
    Margins, Roaming, *map(type, REPLAYED.values()),
]  # fmt: skip
"""What evidence consists of."""


@dataclass(frozen=True)
class Investigated:
    """A network and what speaks for a backdoor in it."""

    scene: Scene
    norm_shift: Tensor
    """float32 [S], of every site's own norm."""
    evidence: Evidence


@dataclass(frozen=True)
class Setting:
    """A network that was called backdoored, ready to be searched."""

    search: Search
    gates: Tensor
    """float32 [S]."""
    gates_forwards: int
    """Image-forwards that the gates took."""

    @classmethod
    def of(cls, search: Search) -> Setting:
        ledger = search.evaluator.ledger
        before = ledger.total
        with torch.enable_grad():
            gates = search.gates(search.evidence.counted)
        return cls(search, gates, ledger.total - before)

    def at(self, config: Config) -> Setting:
        """The same evidence searched otherwise; gates are learned anew where they differ."""
        search, before = self.search, self.search.config
        graph = search.graph
        if config.graph != before.graph:
            graph = build_graph(search.evaluator.trace, search.scene.model, config.graph)
        scene = replace(search.scene, config=config)
        own = Search(scene, graph, search.norm_shift, search.evidence)
        return replace(self, search=own) if config.gates == before.gates else Setting.of(own)

    @property
    def counted(self) -> list[Contender]:
        return self.search.evidence.counted


def investigate(
    model: nn.Module, clean: ImageSet, config: Config, seed: int, kept: Path | None = None
) -> Investigated:
    """As ``onp.sanitize`` gets to its verdict.

    kept: file that what is found is kept in, and read from where it is there.
    """
    scene = opened(model, clean, config, seed=seed, ledger=Ledger())
    if kept is not None and kept.exists():
        with torch.serialization.safe_globals(_KEPT):
            return Investigated(scene, *torch.load(kept, weights_only=True))
    shift = measured_shift(scene)
    with torch.enable_grad():
        evidence = gather(scene, shift)
    found = (by_site(shift, scene.evaluator.trace), evidence)
    if kept is not None:
        write_atomically(kept, lambda temporary: torch.save(found, temporary))
    return Investigated(scene, *found)


def searched(found: Investigated) -> Search | None:
    """What ``onp.sanitize`` would search; None where it finds no backdoor."""
    if found.evidence.verdict.target is None:
        return None
    graph = build_graph(found.scene.evaluator.trace, found.scene.model, found.scene.config.graph)
    return Search(found.scene.with_copies(), graph, found.norm_shift, found.evidence)


def search_of(
    network: ZooModel,
    images: ImageSet,
    samples: int,
    seed: int,
    work: Path,
    budget: str = "standard",
) -> Search | None:
    """What ``onp.sanitize`` would search on a draw of clean images; None where it finds no
    backdoor. What was found is kept in the folder ``work``, by network, draw, budget and
    package."""
    clean = draw_balanced(images, samples, seed)
    of_budget = "" if budget == "standard" else f"_{budget}"
    name = f"{network.name}_{network.digest}_{samples}_seed{seed}{of_budget}_{__version__}.pt"
    return searched(investigate(network.model.eval(), clean, BUDGETS[budget], seed, work / name))


def digest_of(policy: Path) -> str:
    """By which rows name a policy's weights."""
    return hashlib.sha256(policy.read_bytes()).hexdigest()[:12]
