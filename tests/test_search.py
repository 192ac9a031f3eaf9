"""What stands for the attacker's trigger in the search, its draws of images, and other starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from onp.agent.choice import Choice, choose
from onp.agent.cost import Cost
from onp.agent.elite import Elite
from onp.agent.flips import Round, give_back
from onp.agent.learner import Learner
from onp.clean import Clean
from onp.config import AgentConfig, ChoiceConfig, Config, GatesConfig
from onp.evaluate import MaskEvaluator
from onp.evidence import Evidence
from onp.graph import build_graph
from onp.ledger import Ledger
from onp.probes.additive import Additive
from onp.probes.probe import LabelShift, Probe, Target
from onp.probes.race import Contender
from onp.probes.responses import activations
from onp.scene import Scene
from onp.search import FINALISTS, Found, Search
from onp.suspect.trace import trace
from onp.verdict import Verdict
from tests.agent.test_agent import PLANTED, SIZE, toy

By = Literal["norm statistics", "looks"]


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
    [(1, "norm statistics", True), (1, "looks", False), (LabelShift(2), "norm statistics", False)],
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
        search, contender = search_of(scene, probe, reached, "looks")
        cost = search.cost([contender], slice(20), success_weight=2.0)
        others = cost.labels != probe.wanted(cost.labels)
        torch.testing.assert_close(cost.weight, 2.0 * factor * others)


@pytest.mark.parametrize("by", ["looks", "norm statistics"])
def test_each_trigger_of_several_weighs_as_much_as_one(scene: Scene, by: By) -> None:
    """However many stand for it; but for replayed ones, which come stronger than the attacker's."""
    one = toy()[3]
    assert isinstance(one.target, int)
    search, first = search_of(scene, one, 1.0, by)
    second = replace(first, probe=replace(one, target=1 - one.target))
    counted = [first, replace(first), replace(first), second]
    cost = search.cost(counted, slice(20), success_weight=2.0)
    own = [torch.cat(cost.hands[:3]), cost.hands[3]]
    for contender, hands, share in ((first, own[0], 3 / 4), (second, own[1], 1 / 4)):
        wanted = contender.probe.wanted(cost.labels[hands])
        factor = 1.0 if by == "norm statistics" else 1 / share
        expected = 2.0 * factor * (wanted != cost.labels[hands])
        torch.testing.assert_close(cost.weight[hands], expected)
    alone = search.cost([first, replace(first)], slice(20), success_weight=2.0)
    assert float(alone.weight.max()) == 2.0


@pytest.mark.parametrize(
    ("worths", "starts"), [([-0.1], 1), ([-0.4, -0.1], 2), ([-0.4, -0.3, -0.5], 3)]
)
def test_a_dear_repair_is_searched_for_again(
    scene: Scene, worths: list[float], starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, contender = small(scene, AgentConfig(starts=3, dear=0.15), ChoiceConfig())
    sites = scene.evaluator.trace.sites
    asked: list[Tensor] = []

    def run(_counted: object, gates: Tensor, _known: object) -> Found:
        number, mask = len(asked), torch.zeros(sites, dtype=torch.bool)
        mask[number] = True
        asked.append(gates)
        return Found([mask], worths[number], [Round(1, 0.0, 0.0, worths[number])])

    monkeypatch.setattr(search, "run", run)
    with torch.enable_grad():
        masks, rounds = search.find([contender], [])
    assert len(asked) == starts
    assert [log.start for log in rounds] == list(range(starts))
    best = max(range(starts), key=lambda number: worths[number])
    assert int(masks[0].int().argmax()) == best  # the best start's comes first
    assert len(masks) == starts
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(asked, 2))


def test_a_further_start_takes_the_best_of_noisy_gates(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, contender = small(scene, AgentConfig(tries=3, images=20), ChoiceConfig())
    nothing = torch.zeros(search.evaluator.trace.sites)
    planted = nothing.clone()
    planted[PLANTED] = 1.0
    other = nothing.clone()
    other[0 if PLANTED else 1] = 1.0
    asked = list[tuple[int, GatesConfig]]()

    def gates(_: Sequence[Contender], number: int, config: GatesConfig) -> Tensor:
        asked.append((number, config))
        return planted if number % 3 == 2 else other

    monkeypatch.setattr(search, "gates", gates)
    for start in (1, 2):
        asked.clear()
        assert search.other_gates([contender], start) is planted
        numbers = [number for number, _ in asked]
        assert numbers == [3 * start - 2, 3 * start - 1, 3 * start]  # of images of their own
        noisy = search.config.gates
        assert {(one.steps, one.images_per_step) for _, one in asked} == {
            (noisy.noisy_steps, noisy.noisy_images)
        }


@pytest.mark.parametrize("images", [8, 40])
def test_draws_take_turns_and_leave_others_to_give_back_by(scene: Scene, images: int) -> None:
    search, _ = small(scene, AgentConfig(images=images), ChoiceConfig(images=50))
    count = len(scene.clean)
    draws = [search.draw(number) for number in range(4)]
    for seen, unseen in draws:
        assert len(seen) == images
        assert len(unseen) == min(50, count - images)
        assert not set(seen.tolist()) & set(unseen.tolist())
    for (before, _), (after, _) in itertools.pairwise(draws):
        assert after[0] == (before[-1] + 1) % count  # cyclically


def test_a_draw_goes_on_from_what_the_one_before_has_left(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = AgentConfig(images=16, rounds=3, further=(2, 1), steps=1)
    choice = ChoiceConfig(leaders=1, least=8)
    search, contender = small(scene, agent, choice)
    starts: list[Tensor] = []
    limits: list[int] = []
    seen: list[Tensor] = []
    learners: set[int] = set()

    def improved(
        cost: Cost, start: Tensor, learner: Learner, limit: int
    ) -> tuple[Elite, list[Round]]:
        elite = Elite(1)
        elite.offer(torch.ones(1, cost.sites, dtype=torch.bool), torch.tensor([-float(limit)]))
        starts.append(start)
        limits.append(limit)
        seen.append(cost.images)
        learners.add(id(learner))
        return elite, [Round(1, 0.0, 0.0, 0.0)]

    asked: list[tuple[Tensor, Cost, int]] = []

    def noted(mask: Tensor, cost: Cost, rounds: int) -> Tensor:
        asked.append((mask, cost, rounds))
        return give_back(mask, cost, rounds)

    monkeypatch.setattr(search, "improved", improved)
    monkeypatch.setattr("onp.search.give_back", noted)
    ranking = torch.rand(scene.evaluator.trace.sites)
    known = torch.ones(scene.evaluator.trace.sites, dtype=torch.bool)
    with torch.enable_grad():
        found = search.run([contender], ranking, [known])
    assert limits == [3, 2, 1]
    count = len(scene.clean)
    for number, (mask, cost, rounds) in enumerate(asked):
        places = (torch.arange(count - 16) + 16 * (number + 1)) % count  # none that were seen
        assert torch.equal(cost.images, scene.clean.images[places])
        assert cost.config.success_weight == choice.success_weight
        assert rounds == choice.rounds
        assert mask.all()
    assert torch.equal(starts[0][-1], known)  # beside what the gates start from
    given = [found.masks[place] for place in (4, 2, 0)]  # of the first draw, the second, the last
    assert all(not mask.all() for mask in given)  # pruning everything is not worth it elsewhere
    assert torch.equal(starts[1], given[0][None])
    assert torch.equal(starts[2], given[1][None])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert found.worth == -3.0  # of the first draw, which all starts have in common
    assert [log.draw for log in found.rounds] == [0, 1, 2]
    assert len(learners) == 1  # the agent goes on learning


@pytest.mark.parametrize("left", [5, 6])
def test_with_too_few_images_nothing_is_given_back(
    scene: Scene, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = AgentConfig(images=len(scene.clean) - left, rounds=2)
    search, contender = small(scene, agent, ChoiceConfig(least=6))
    asked: list[Tensor] = []
    searched: list[int] = []

    def noted(mask: Tensor, _cost: Cost, _rounds: int) -> Tensor:
        asked.append(mask)
        return mask

    def improved(*arguments: Any) -> tuple[Elite, list[Round]]:
        searched.append(arguments[-1])
        return Search.improved(search, *arguments)

    monkeypatch.setattr("onp.search.give_back", noted)
    monkeypatch.setattr(search, "improved", improved)
    with torch.enable_grad():
        found = search.run([contender], torch.rand(scene.evaluator.trace.sites), [])
    assert len(asked) == (0 if left == 5 else 2)
    assert len(found.masks) == (FINALISTS if left == 5 else 2)
    assert searched == ([2] if left == 5 else [2, 8])


@pytest.mark.parametrize("steps", [0, 2])
def test_an_agent_learns_only_where_it_is_told_to(scene: Scene, steps: int) -> None:
    search, contender = small(scene, AgentConfig(rounds=4, steps=steps), ChoiceConfig())
    ranking = torch.zeros(scene.evaluator.trace.sites)
    assert (search.learner([contender], ranking) is None) == (steps == 0)
    with torch.enable_grad():
        found = search.run([contender], ranking, [])
    assert [log.loss > 0 for log in found.rounds] == [steps > 0] * len(found.rounds)
    assert found.rounds


@pytest.mark.parametrize("raced", [16, 24, 32])
@pytest.mark.parametrize("close", [0, 2, 1e6])
def test_first_masks_are_raced_on_a_part_of_the_images(
    scene: Scene, raced: int, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onp.search.CLOSE", close)
    search, contender = small(scene, AgentConfig(images=24, raced=raced), ChoiceConfig())
    random = torch.Generator().manual_seed(0)
    masks = torch.rand(7, scene.evaluator.trace.sites, generator=random) < 0.3
    apart = small(scene, AgentConfig(), ChoiceConfig())[0].cost([contender], slice(raced))
    worths, each = apart.worth(masks), apart.each(apart.parts(masks))
    order = worths[1:].argsort(descending=True) + 1
    masks = torch.cat([masks, masks[order[:1]]])  # the best of them twice
    before = scene.evaluator.ledger.total
    left = search.raced([contender], masks)
    spent = scene.evaluator.ledger.total - before
    if raced >= 24:
        assert torch.equal(left, masks)
        assert spent == 0
        return
    assert spent == 6 * 2 * raced
    assert torch.equal(left[0], masks[0])  # nothing pruned, whatever it is worth
    best = order[0]
    expected = [
        row
        for row in order[:FINALISTS]
        if row == best
        or float(worths[best] - worths[row])
        <= close * float((each[row] - each[best]).std()) / raced**0.5
    ]
    if close != 2:
        assert len(expected) == {0: 1, 1e6: FINALISTS}[close]
    assert {tuple(m.tolist()) for m in left[1:]} == {tuple(masks[r].tolist()) for r in expected}
    assert torch.equal(search.raced([contender], masks[:1]), masks[:1])


def test_a_race_of_masks_that_are_worth_nothing_leaves_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, contender = small(scene, AgentConfig(images=24, raced=16), ChoiceConfig())
    masks = torch.eye(scene.evaluator.trace.sites, dtype=torch.bool)[:5]
    told = Cost.parts
    monkeypatch.setattr(
        Cost, "parts", lambda cost, pruned: replace(p := told(cost, pruned), harm=p.harm * math.nan)
    )
    assert len(search.raced([contender], masks)) == 2


def spent(scene: Scene, act: Callable[[], object]) -> int:
    """Image-forwards."""
    before = scene.evaluator.ledger.total
    act()
    return scene.evaluator.ledger.total - before


def test_no_mask_is_asked_for_twice_on_the_same_images(scene: Scene) -> None:
    search, contender = small(scene, AgentConfig(), ChoiceConfig())
    random = torch.Generator().manual_seed(1)
    masks = torch.rand(5, scene.evaluator.trace.sites, generator=random) < 0.3
    first = search.cost([contender], slice(20))
    dearer = search.cost([contender], torch.arange(20), success_weight=7.0)
    assert spent(scene, lambda: first.parts(masks[[0, 1, 1]])) == 2 * 2 * 20
    assert spent(scene, lambda: dearer.parts(masks[[1, 2, 0]])) == 2 * 20
    for others in (slice(21), torch.arange(20).flip(0)):
        assert spent(scene, lambda o=others: search.cost([contender], o).parts(masks[:1]))
    twice = [contender, replace(contender, probe=replace(contender.probe, target=0))]
    assert spent(scene, lambda: search.cost(twice, slice(20)).parts(masks[:1])) == 2 * 20

    fresh, _ = small(scene, AgentConfig(), ChoiceConfig())
    wanted = fresh.cost([contender], slice(20), success_weight=7.0)
    for name in ("harm", "success", "turned"):
        torch.testing.assert_close(
            getattr(dearer.parts(masks[:3]), name), getattr(wanted.parts(masks[:3]), name),
            rtol=0, atol=0,
        )  # fmt: skip
    assert torch.equal(dearer.worth(masks[:3]), wanted.worth(masks[:3]))
    assert not torch.equal(dearer.worth(masks[:3]), first.worth(masks[:3]))
    assert len(first.worth(masks[:0])) == 0


def test_what_was_told_roughly_is_told_again_in_fp32(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, contender = small(scene, AgentConfig(), ChoiceConfig())
    masks = torch.eye(scene.evaluator.trace.sites, dtype=torch.bool)[:3]
    cost = search.cost([contender], slice(20))
    exact = search.cost([contender], slice(20), exact=True)
    with monkeypatch.context() as rough:
        rough.setattr(scene.evaluator, "rough_plan", scene.evaluator.plan)
        rough.setattr(scene.evaluator, "_rough_precision", "int8")
        assert spent(scene, lambda: cost.parts(masks)) == 3 * 2 * 20
        assert spent(scene, lambda: exact.parts(masks)) == 3 * 2 * 20
        assert spent(scene, lambda: cost.parts(masks)) == 0
    assert spent(scene, lambda: cost.parts(masks)) == 0


def test_another_start_forgets_what_other_ranges_told(scene: Scene) -> None:
    search, contender = small(scene, AgentConfig(), ChoiceConfig())
    scene = replace(search.scene, config=replace(search.config, search_precision="int8"))
    search = Search(scene, search.graph, search.norm_shift, search.evidence)
    cost = search.cost([contender], slice(20))
    mask = torch.eye(scene.evaluator.trace.sites, dtype=torch.bool)[:1]
    exact = cost.parts(mask).harm
    (name,) = cost.told
    cost.told[(False, name[1])] = torch.ones(3, 20)
    try:
        search.calibrate(cost, torch.cat([mask, mask]))
    finally:
        scene.evaluator.rough_plan = None
    assert list(cost.told) == [name]
    assert torch.equal(cost.parts(mask).harm, exact)


def test_copies_have_no_part_in_the_last_choice(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, contender = small(scene, AgentConfig(), ChoiceConfig())
    masks = list(torch.eye(scene.evaluator.trace.sites, dtype=torch.bool)[:3])
    given = len(scene.clean) - 7
    monkeypatch.setattr(search, "scene", replace(search.scene, copies=7))
    expected = choose(masks, [search.cost([contender], slice(given), 2.0, exact=True)])
    assert search.choose(masks, [contender]).cost == pytest.approx(expected.cost, abs=1e-6)


@pytest.mark.parametrize("judged", [12, 30, 45, 500])
@pytest.mark.parametrize(("seen", "told"), [(500, 0), (20, 15), (20, 200)])
def test_the_last_choice_asks_for_what_is_not_known(
    scene: Scene, judged: int, seen: int, told: int
) -> None:
    choice = ChoiceConfig(images=told, judged=judged)
    search, contender = small(scene, AgentConfig(images=seen), choice)
    sites = scene.evaluator.trace.sites
    masks = list(torch.eye(sites, dtype=torch.bool)[:3])
    count = min(judged, len(scene.clean))
    known = min(seen, count)
    nothing = torch.zeros(1, sites, dtype=torch.bool)
    if known == min(seen, len(scene.clean)):
        search.cost([contender], search.draw(0)[0]).parts(torch.cat([nothing, torch.stack(masks)]))
    else:
        known = 0  # a part of what was asked, whose triggers are dealt out otherwise
    found: list[Choice] = []
    asked = spent(scene, lambda: found.append(search.choose(masks, [contender])))
    assert asked == 4 * 2 * (count - known)
    whole = choose(masks, [search.cost([contender], slice(count), choice.success_weight)])
    assert torch.equal(found[0].mask, whole.mask)
    assert found[0].cost == pytest.approx(whole.cost, abs=1e-5)
    assert found[0].success_before == pytest.approx(whole.success_before, abs=1e-5)
    assert found[0].success_after == pytest.approx(whole.success_after, abs=1e-5)


def small(scene: Scene, agent: AgentConfig, choice: ChoiceConfig) -> tuple[Search, Contender]:
    """A search with a part of its configuration."""
    scene = replace(scene, config=replace(scene.config, agent=agent, choice=choice))
    return search_of(scene, toy()[3], 1.0, "looks")
