"""The table of kernels: what is compared with what, and that wrong results have no speed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench.kernels.gate import timed
from bench.kernels.gated import gated, gates_of
from bench.kernels.masked_forward import (
    FIRST,
    LAST,
    Way,
    cases,
    eager,
    edited,
    folded,
    measure,
    ours,
    vmapped,
)  # fmt: skip
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row, compared, table
from onp.ops.reference import masked_forward as reference
from onp.suspect.trace import trace


def row(name: str, seconds: float | None, *, precision: str = "fp32", forced: bool = False) -> Row:
    return Row("k", "c", name, precision, seconds, seconds is not None, forced=forced)


def test_ours_are_compared_with_the_best_correct_baseline_of_their_precision() -> None:
    rows = compared(
        [
            row("onp", 2.0), row("onp, generic", 3.0, forced=True), row("slow", 9.0),
            row("fast", 3.0), row("wrong", None), row("half", 1.0, precision="reduced"),
        ]
    )  # fmt: skip
    ratios = {one.implementation: one.ratio_to_best_baseline for one in rows}
    assert ratios["onp"] == 1.5
    assert {name for name, ratio in ratios.items() if ratio is not None} == {"onp"}
    assert "| wrong | fp32 | – |" in table(rows)


def test_ours_in_reduced_precision_are_compared_with_whatever_is_fastest() -> None:
    ours = row("onp, 8 bits", 2.0, precision="reduced")
    for half, whole, ratio in ((4.0, 6.0, 2.0), (8.0, 6.0, 3.0)):
        rows = compared([ours, row("half", half, precision="reduced"), row("whole", whole)])
        assert rows[0].ratio_to_best_baseline == ratio


def test_a_wrong_result_has_no_speed() -> None:
    good = torch.arange(5.0)
    assert timed(row("a", None), lambda: [good], [good], 1).correct
    for bad in (good + 1, good[:3], torch.full((5,), torch.nan)):
        found = timed(row("a", None), lambda bad=bad: [bad], [good], 1)
        assert (found.correct, found.seconds) == (False, None)
        assert found.note

    def fails() -> list[Tensor]:
        raise ValueError("no")

    assert "no" in timed(row("a", None), fails, [good], 1).note


def test_gates_as_inputs_are_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 4),
    ).eval()  # fmt: skip
    traced = trace(model, (3, 8, 8))
    pruned = torch.rand(4, traced.sites) < 0.4
    images = torch.rand(5, 3, 8, 8)
    layers = [
        (one.sites, [str(traced.ops[c].module) for c in one.consumers]) for one in traced.layers
    ]
    network = gated(model, traced)
    found = torch.stack([network(images, gates) for gates in gates_of(pruned)])
    torch.testing.assert_close(found, reference(model, layers, pruned, images))


@pytest.mark.parametrize(
    "way",
    [Way("onp", "fp32", ours(), every_mask=True, depends=True), Way("eager", "fp32", eager(FIRST)),
     Way("vmap", "fp32", vmapped), Way("edited", "fp32", edited(LAST)),
     Way("folded", "fp32", folded)],
    ids=lambda way: way.name,
)  # fmt: skip
def test_every_way_gives_the_same(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bench.kernels.masked_forward.NETWORKS", {"small": ("preactresnet10", 4, {})}
    )
    case = next(cases("small", 4, 3, (0.1,)))
    found = measure(case, way, 1, peak=1.0)
    assert found.correct, found.note
    wrong = Way("wrong", "fp32", lambda case: lambda pruned: 1.01 * way.make(case)(pruned))
    assert not measure(case, wrong, 1, peak=1.0).correct


def test_ceilings_are_of_this_machine() -> None:
    ceilings = Ceilings.measured(1)
    assert 1 < ceilings.fp32_gflops < 1000
    assert 0.5 < ceilings.copy_gbytes < 1000
