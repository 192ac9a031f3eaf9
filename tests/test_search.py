"""What stands for the attacker's trigger in the search, and when the search starts again."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from onp.agent.elite import Elite
from onp.agent.flips import Round
from onp.agent.race import Contender
from onp.clean import Clean
from onp.config import Config
from onp.evaluate import MaskEvaluator
from onp.evidence import Evidence, Scene
from onp.graph import build_graph
from onp.ledger import Ledger
from onp.probes.additive import Additive
from onp.probes.probe import LabelShift, Probe, Target
from onp.probes.responses import activations
from onp.search import Search
from onp.suspect.trace import trace
from onp.verdict import Verdict
from tests.agent.test_agent import SIZE, toy

By = Literal["norm statistics", "probes"]


@pytest.fixture(scope="module")
def scene() -> Scene:
    model, images, labels, _ = toy()
    evaluator = MaskEvaluator(trace(model, (3, SIZE, SIZE)), model, ledger=Ledger())
    before = activations(evaluator.network, images[:8])
    clean = Clean.seen_by(evaluator, images, labels)
    return Scene(model, evaluator, clean, before, Config(), (0.0, 1.0), 0)


def search_of(scene: Scene, probe: Probe, reached: float, by: By) -> tuple[Search, Contender]:
    sites = scene.evaluator.trace.sites
    contender = Contender(probe, torch.zeros(sites), reached, torch.zeros(sites, dtype=torch.bool))
    verdict = Verdict("backdoor", 1.0, probe.target, by, {}, "")
    graph = build_graph(scene.evaluator.trace, scene.model, scene.config.graph)
    evidence = Evidence(verdict, [contender], [contender])
    return Search(scene, graph, torch.zeros(sites), evidence), contender


@pytest.mark.parametrize(
    ("target", "by", "strengthened"),
    [(1, "norm statistics", True), (1, "probes", False), (LabelShift(2), "norm statistics", False)],
)
def test_replayed_triggers_of_a_class_come_at_several_strengths(
    scene: Scene, target: Target, by: By, strengthened: bool
) -> None:
    probe = Probe(Additive(), target, [torch.full((1, 1, 3, SIZE, SIZE), 0.05)], (0.0, 1.0), 1.0)
    search, contender = search_of(scene, probe, 1.0, by)
    cost = search.cost([contender], slice(20))
    changes = (cost.triggered - cost.images).flatten(1).norm(dim=1)
    weaker = (probe(cost.images) - cost.images).flatten(1).norm(dim=1)
    stronger = changes > 1.05 * weaker
    assert stronger.sum() == (10 if strengthened else 0)
    torch.testing.assert_close(changes[~stronger], weaker[~stronger])


def test_a_trigger_that_adds_little_weighs_more(scene: Scene) -> None:
    probe = toy()[3]
    for reached, factor in ((1.0, 1.0), (0.5, 2**0.5), (0.01, 3**0.5)):
        search, contender = search_of(scene, probe, reached, "probes")
        cost = search.cost([contender], slice(20), success_weight=2.0)
        others = cost.labels != probe.wanted(cost.labels)
        torch.testing.assert_close(cost.weight, 2.0 * factor * others)


@pytest.mark.parametrize(
    ("worths", "starts"), [([-0.1], 1), ([-0.4, -0.1], 2), ([-0.4, -0.3, -0.5], 3)]
)
def test_a_dear_repair_is_searched_for_again(
    scene: Scene, worths: list[float], starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, contender = search_of(scene, toy()[3], 1.0, "probes")
    sites = scene.evaluator.trace.sites
    asked: list[Tensor] = []

    def run(_counted: object, gates: Tensor, _known: object) -> tuple[Elite, list[Round]]:
        elite, mask = Elite(3), torch.zeros(sites, dtype=torch.bool)
        mask[len(asked)] = True
        elite.offer(mask[None], torch.tensor(worths[len(asked) : len(asked) + 1]))
        asked.append(gates)
        return elite, [Round(1, 0, 0.0, 0.0, elite.worths[0])]

    monkeypatch.setattr(search, "run", run)
    with torch.enable_grad():
        masks, rounds = search.find([contender], [])
    assert len(asked) == starts
    assert [log.start for log in rounds] == list(range(starts))
    best = max(range(starts), key=lambda number: worths[number])
    assert int(masks[0].int().argmax()) == best  # the best start's comes first
    assert len(masks) == starts
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(asked, 2))
