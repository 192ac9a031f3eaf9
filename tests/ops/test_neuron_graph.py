from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from onp import _C
from onp.errors import NativeError, NotBuiltError
from onp.ops import reference
from onp.ops.csr import csr_from_edges
from onp.ops.neuron_graph import (
    Edges,
    connection_strength,
    connection_strengths,
    similarity_edges,
    similarity_edges_of,
    strongest_edges,
    strongest_edges_of,
)

SEEDS = st.integers(0, 2**31 - 1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def random_matrix(rows: int, cols: int, seed: int, levels: int | None = None) -> Tensor:
    """Normal entries, or with ``levels`` integers in ``[0, levels)``: many ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (rows, cols), generator=generator).float()
    return torch.randn(rows, cols, generator=generator)


def pairs(edges: tuple[Tensor, Tensor, Tensor]) -> list[tuple[int, int]]:
    return list(zip(edges[0].tolist(), edges[1].tolist(), strict=True))


def assert_same_edges(got: Edges, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    assert pairs(got) == pairs(expected)
    torch.testing.assert_close(got.values, expected[2], rtol=1e-5, atol=1e-6)


# ---- connection strength


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "shape",
    [
        (5, 3),
        (4, 3, 1, 1),
        (33, 17, 3, 3),
        (6, 5, 7, 7),
        (3, 2, 5),
        (2, 3, 2, 2, 2),
        (300, 200, 2),
        (0, 4, 3, 3),
        (4, 0, 3, 3),
        (4, 3, 0, 3),
    ],
    ids=str,
)
def test_strength_matches_reference(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = connection_strength(weight)
    assert got.shape == shape[:2]
    torch.testing.assert_close(got, reference.connection_strength(weight), rtol=1e-5, atol=1e-6)
    with threads(1):
        assert torch.equal(connection_strength(weight), got)


def test_strength_of_a_slice_and_of_a_parameter() -> None:
    weight = torch.randn(6, 8, 3, 3)
    torch.testing.assert_close(
        connection_strength(weight[::2, 1::3]), reference.connection_strength(weight[::2, 1::3])
    )
    got = connection_strength(torch.nn.Parameter(weight.to(memory_format=torch.channels_last)))
    torch.testing.assert_close(got, reference.connection_strength(weight))
    assert not got.requires_grad


def test_strength_refuses_wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"weight must be float32 \[O, I, \*K\] on .*, got torch.float64"
    ):
        connection_strength(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got torch.float32 \(2,\)"):
        connection_strength(torch.zeros(2))
    with pytest.raises(ValueError, match=r"on the CPU or on CUDA, got .* on meta"):
        connection_strength(torch.zeros(2, 2, device="meta"))

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(_C, "with_cuda", False)
    on_cuda = torch.zeros(2, 2).as_subclass(OnCuda)
    with pytest.raises(NotBuiltError, match="built without CUDA kernels"):
        connection_strength(on_cuda)
    with pytest.raises(NotBuiltError, match="strongest_edges: onp was built without CUDA"):
        strongest_edges(on_cuda, 1)
    with pytest.raises(NotBuiltError, match="similarity_edges: onp was built without CUDA"):
        similarity_edges(on_cuda, 0.5, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(129, 65, 3, 3), (40, 30, 7, 7), (50, 70), (3, 0, 3)], ids=str)
def test_strength_on_another_stream(shape: tuple[int, ...]) -> None:
    stream = torch.cuda.Stream()
    weight = torch.randn(shape)
    with torch.cuda.stream(stream):
        on_device = weight.to("cuda")
        for _ in range(50):  # work that the kernel has to wait for
            on_device = on_device * 1.01
        got = connection_strength(on_device) + 1
    stream.synchronize()
    torch.testing.assert_close(got, reference.connection_strength(on_device) + 1)


# ---- strongest edges


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 45), SEEDS, st.booleans())
def test_strongest_edges_match_reference(
    rows: int, cols: int, k: int, seed: int, ties: bool
) -> None:
    strength = random_matrix(rows, cols, seed, levels=4 if ties else None)
    got = strongest_edges(strength, k)
    assert_same_edges(got, reference.strongest_edges(strength, k))
    assert torch.equal(got.values, strength[got.rows, got.cols])
    with threads(1):
        assert all(map(torch.equal, strongest_edges(strength, k), got))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), SEEDS)
def test_strongest_edges_reach_every_neuron_and_stay_few(
    rows: int, cols: int, k: int, seed: int
) -> None:
    strength = random_matrix(rows, cols, seed).abs()
    assume(bool((strength > 0).all()))
    got = strongest_edges(strength, k)
    row_degree = torch.bincount(got.rows, minlength=rows)
    col_degree = torch.bincount(got.cols, minlength=cols)
    assert row_degree.min() >= min(k, cols)
    assert col_degree.min() >= min(k, rows)
    assert len(got.rows) <= rows * min(k, cols) + cols * min(k, rows)
    assert pairs(got) == sorted(set(pairs(got)))


@settings(deadline=None)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 6), SEEDS)
def test_strongest_edges_follow_a_permutation(rows: int, cols: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randperm(rows * cols, generator=generator).float().view(rows, cols)
    new_rows = torch.randperm(rows, generator=generator)
    new_cols = torch.randperm(cols, generator=generator)
    got = strongest_edges(strength[new_rows][:, new_cols], k)
    renamed = zip(new_rows[got.rows].tolist(), new_cols[got.cols].tolist(), strict=True)
    assert sorted(renamed) == pairs(strongest_edges(strength, k))


def test_zero_and_nan_strengths_are_no_edges() -> None:
    strength = torch.tensor([[0.0, torch.nan, 1e-45], [torch.inf, -1.0, 0.0]])
    assert pairs(strongest_edges(strength, 3)) == [(0, 2), (1, 0)]


def test_ties_go_to_the_lower_index() -> None:
    assert pairs(strongest_edges(torch.ones(1, 3), 0)) == []
    strength = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert pairs(strongest_edges(strength, 1)) == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("levels", [None, 3, 12])
@pytest.mark.parametrize("k", [1, 8, 12, 13, 40])
@pytest.mark.parametrize(("rows", "cols"), [(70, 48), (33, 16), (48, 17), (15, 100)])
def test_whole_vectors_are_not_left_behind(
    rows: int, cols: int, k: int, levels: int | None
) -> None:
    """Sizes at which the bars of whole vectors are at work, beside those where they are not."""
    strength = random_matrix(rows, cols, seed=rows + k, levels=levels)
    strength[rows // 2, cols // 2] = torch.nan
    strength[rows // 3] = -torch.inf
    assert_same_edges(strongest_edges(strength, k), reference.strongest_edges(strength, k))


def test_strongest_edges_of_a_slice() -> None:
    strength = random_matrix(12, 14, 0)[::2, ::2]
    assert_same_edges(strongest_edges(strength, 2), reference.strongest_edges(strength, 2))


@pytest.mark.parametrize(
    ("strength", "k", "message"),
    [
        (torch.zeros(2, 2), -1, "k must be at least 0, got -1"),
        (torch.zeros(2), 1, "strength must be a float32 matrix on the CPU"),
        (torch.zeros(2, 2).double(), 1, "got torch.float64"),
        (torch.zeros(2, 2, device="meta"), 1, "on meta"),
    ],
)
def test_strongest_edges_refuse(strength: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strongest_edges(strength, k)


# ---- similarity edges


def clear_cut(vectors: Tensor, threshold: float) -> bool:
    """Whether float32 rounding can change neither the threshold nor any ranking."""
    units = torch.nn.functional.normalize(vectors.double())
    upper = torch.triu_indices(len(vectors), len(vectors), 1)
    values = torch.cat([(units @ units.T)[upper[0], upper[1]], torch.tensor([threshold])])
    return bool((values.sort().values.diff() > 1e-6).all())


@settings(deadline=None)
@given(st.integers(0, 24), st.integers(2, 40), st.floats(-1, 0.6), st.integers(0, 12), SEEDS)
def test_similarity_edges_match_reference(
    nodes: int, size: int, threshold: float, most: int, seed: int
) -> None:
    vectors = random_matrix(nodes, size, seed)
    assume(clear_cut(vectors, threshold))
    got = similarity_edges(vectors, threshold, most)
    assert_same_edges(got, reference.similarity_edges(vectors, threshold, most))


@settings(deadline=None)
@given(st.integers(0, 70), st.integers(0, 40), st.floats(-1, 1), st.integers(0, 12), SEEDS)
def test_similarity_edges_are_symmetric_and_bounded(
    nodes: int, size: int, threshold: float, most: int, seed: int
) -> None:
    vectors = random_matrix(nodes, size, seed, levels=3)
    got = similarity_edges(vectors, threshold, most)
    found = pairs(got)
    assert found == sorted(set(found))
    assert len(found) <= 2 * nodes * most
    assert (got.rows != got.cols).all()
    assert (got.values >= threshold - 1e-6).all()
    assert (got.values <= 1).all()
    by_pair = dict(zip(found, got.values.tolist(), strict=True))
    assert all(by_pair[col, row] == value for (row, col), value in by_pair.items())
    zero = (vectors == 0).all(1)
    assert not zero[got.rows].any()
    with threads(1):
        assert all(map(torch.equal, similarity_edges(vectors, threshold, most), got))


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(2, 30), st.integers(1, 5), SEEDS)
def test_similarity_edges_follow_a_permutation(nodes: int, size: int, most: int, seed: int) -> None:
    vectors = random_matrix(nodes, size, seed)
    assume(clear_cut(vectors, 0.1))
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed))
    got = similarity_edges(vectors[order], 0.1, most)
    renamed = zip(order[got.rows].tolist(), order[got.cols].tolist(), strict=True)
    assert sorted(renamed) == pairs(similarity_edges(vectors, 0.1, most))


def test_large_matrix_matches_reference_similarities() -> None:
    vectors = random_matrix(131, 517, 0)[:, 3:]
    got = similarity_edges(vectors, -1.0, 131)
    assert len(got.rows) == 131 * 130
    expected = reference.similarity_edges(vectors, -1.0, 131)
    assert_same_edges(got, expected)


def test_scale_does_not_matter_and_bad_vectors_have_no_edges() -> None:
    base = torch.tensor([[1.0, 2.0], [1e-30, 2e-30], [1e30, 2e30]])
    bad = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    got = similarity_edges(torch.cat([base, bad]), 0.999, 5)
    assert pairs(got) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert pairs(similarity_edges(bad, -1.0, 5)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2), 1.5, 1), r"threshold must be in \[-1, 1\], got 1.5"),
        ((torch.zeros(2, 2), float("nan"), 1), "threshold must be in"),
        ((torch.zeros(2, 2), 0.5, -1), "max_neighbours must be at least 0, got -1"),
        ((torch.zeros(2, 2, 2), 0.5, 1), "vectors must be a float32 matrix"),
    ],
)
def test_similarity_edges_refuse(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_edges(*arguments)


# ---- many layers at once

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
"""The CPU last: there the same is asked of the singular functions alone."""

KERNELS = [(), (1, 1), (3, 3), (2, 2), (5, 5), (7, 7), (32,), (0, 3)]


def matrices(count: int = 12) -> list[Tensor]:
    """Odd sizes, empty ones, ties, bad values, whole rows alike, and what is not contiguous."""
    sizes = [(0, 0), (1, 1), (0, 5), (5, 0), (33, 17), (64, 64), (70, 48), (129, 131), (1, 300)]
    found = [random_matrix(*sizes[i % len(sizes)], seed=i) for i in range(count)]
    found += [random_matrix(40, 33, seed=i, levels=3) for i in range(3)]
    found += [torch.zeros(9, 12), torch.ones(37, 70), -torch.ones(5, 6)]
    bad = random_matrix(66, 45, seed=1)
    bad[3, 5], bad[4, 5], bad[7], bad[:, 9], bad[12] = torch.nan, torch.inf, torch.nan, 0.0, 0.0
    bad[20, 20], bad[21, 20], bad[22] = -torch.inf, -0.0, torch.inf
    return [*found, bad, random_matrix(60, 80, 5)[::2, 1::3], random_matrix(50, 20, 6).T]


def assert_edges_on(device: str, got: list[Edges], expected: list[Edges]) -> None:
    """The same edges, and the same values bit for bit."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert {part.device.type for part in one} == {device}
        assert [part.dtype for part in one] == [torch.int64, torch.int64, torch.float32]
        assert all(map(torch.equal, (part.cpu() for part in one), other))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("repeats", [1, 9])
def test_strengths_of_many_layers(device: str, repeats: int) -> None:
    """More layers than a launch takes with nine repeats."""
    sizes = [(5, 3), (33, 17), (1, 1), (0, 4), (4, 0), (130, 64)]
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn((*size, *kernel), generator=generator) for size in sizes for kernel in KERNELS
    ]
    weights = [*weights * repeats, torch.randn(8, 6, 3, 3)[::2, 1::3], torch.randn(6, 7).T]
    weights += [torch.nn.Parameter(torch.randn(9, 4, 3, 3).to(memory_format=torch.channels_last))]
    weights += [torch.randn(4 * 9 * 9 + 1)[1:].view(4, 9, 3, 3)]  # not on a whole vector
    got = connection_strengths([weight.detach().to(device) for weight in weights])
    assert len(got) == len(weights)
    for strength, weight in zip(got, weights, strict=True):
        assert strength.device.type == device
        assert strength.is_contiguous()
        assert not strength.requires_grad
        expected = connection_strength(weight)
        torch.testing.assert_close(strength.cpu(), expected, rtol=1e-5, atol=0)
    alone = connection_strength(weights[-2].to(device))
    torch.testing.assert_close(alone.cpu(), connection_strength(weights[-2]), rtol=1e-5, atol=0)
    assert not alone.requires_grad


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [0, 1, 8, 20, 2**40])
def test_strongest_edges_of_many_matrices(device: str, k: int) -> None:
    for count in (12, 90):
        strengths = matrices(count)
        expected = [strongest_edges(strength, k) for strength in strengths]
        on_device = [strength.to(device) for strength in strengths]
        assert_edges_on(device, strongest_edges_of(on_device, k), expected)
        assert_edges_on(device, [strongest_edges(on_device[-1], k)], expected[-1:])
    of_views = strongest_edges_of([torch.eye(40, device=device)[::2, ::2].T], k)
    assert_edges_on(device, of_views, [strongest_edges(torch.eye(20), k)])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("most", [0, 1, 8, 2**40])
def test_similarity_edges_of_many_matrices(device: str, threshold: float, most: int) -> None:
    """Vectors of ones and minus ones, whose similarities are exact and often equal."""
    sizes = [(0, 4), (5, 0), (1, 16), (2, 1), (64, 16), (65, 64), (130, 4), (40, 256)]
    vectors = [2 * random_matrix(*size, seed=i, levels=2) - 1 for i, size in enumerate(sizes)]
    bad = vectors[5].clone()
    bad[0], bad[64], bad[7, 3], bad[8, 0], bad[9] = 0, 0, torch.nan, torch.inf, -torch.inf
    vectors += [bad, *[vectors[5][n : n + 9] for n in range(60)], vectors[7].T[:, :16]]
    expected = [similarity_edges(one, threshold, most) for one in vectors]
    on_device = [one.to(device) for one in vectors]
    assert_edges_on(device, similarity_edges_of(on_device, threshold, most), expected)
    alone = [similarity_edges(on_device[6], threshold, most)]
    assert_edges_on(device, alone, expected[6:7])


@pytest.mark.parametrize("device", DEVICES)
def test_similarities_of_many_matrices_are_close_and_symmetric(device: str) -> None:
    vectors = [random_matrix(*size, seed=2) for size in ((24, 40), (131, 517), (16, 3))]
    vectors[0][:2] *= torch.tensor([[1e-30], [1e30]])
    for one, edges in zip(
        vectors, similarity_edges_of([one.to(device) for one in vectors], -1.0, 200), strict=True
    ):
        on_host = Edges(*(part.cpu() for part in edges))
        expected = reference.similarity_edges(one, -1.0, 200)
        assert len(on_host.rows) == len(one) * (len(one) - 1)
        assert_same_edges(on_host, expected)
        square = torch.zeros(len(one), len(one)).index_put(on_host[:2], on_host.values)
        assert torch.equal(square, square.T)
    few = random_matrix(24, 40, seed=2)
    assert clear_cut(few, 0.1)
    first, again = similarity_edges_of([few.to(device)] * 2, 0.1, 3)
    assert_same_edges(
        Edges(*(part.cpu() for part in first)), reference.similarity_edges(few, 0.1, 3)
    )
    assert all(map(torch.equal, first, again))


@pytest.mark.gpu
def test_edges_on_another_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        strength = random_matrix(300, 200, 0).to("cuda")
        for _ in range(50):  # work that the kernels have to wait for
            strength = strength * 1.01
        got = strongest_edges(strength, 8)
        assert_edges_on("cuda", [got], [strongest_edges(strength.cpu(), 8)])


def test_no_layers_and_layers_apart() -> None:
    assert connection_strengths([]) == strongest_edges_of([], 1) == []
    assert similarity_edges_of([], 0.5, 1) == []
    with pytest.raises(ValueError, match="k must be at least 0"):
        strongest_edges_of([], -1)
    with pytest.raises(ValueError, match="threshold must be in"):
        similarity_edges_of([], 2.0, 1)
    one, wrong = torch.zeros(2, 2), torch.zeros(2)
    for call in (
        connection_strengths,
        lambda given: strongest_edges_of(given, 1),
        lambda given: similarity_edges_of(given, 0.5, 1),
    ):
        with pytest.raises(ValueError, match=r"must be .*float32.*got"):
            call([one, wrong])


@pytest.mark.gpu
def test_layers_on_two_devices_are_refused() -> None:
    one = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="must all be on one device, got cpu and cuda"):
        connection_strengths([one, one.cuda()])
    with pytest.raises(ValueError, match="must all be on one device, got cuda:0 and cpu"):
        strongest_edges_of([one.cuda(), one], 1)


# ---- edges to CSR


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 60), SEEDS)
def test_csr_from_edges_matches_reference(nodes: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(nodes, (count,), generator=generator)
    cols = torch.randint(nodes, (count,), generator=generator)
    values = torch.randn(count, generator=generator)
    graph, summed = csr_from_edges(rows, cols, values, nodes)
    indptr, indices, expected = reference.csr_from_edges(rows, cols, values, nodes)
    assert torch.equal(graph.indptr, indptr)
    assert torch.equal(graph.indices, indices)
    assert torch.equal(summed, expected)
    dense = torch.zeros(nodes, nodes)
    dense[reference.csr_rows(graph.t_indptr), graph.t_indices] = summed[graph.t_edge]
    torch.testing.assert_close(
        dense.T, torch.zeros(nodes, nodes).index_put((rows, cols), values, accumulate=True)
    )


def test_chosen_edges_make_a_graph() -> None:
    edges = strongest_edges(random_matrix(9, 9, 1), 2)
    graph, values = csr_from_edges(*edges, nodes=9)
    assert torch.equal(values, edges.values)
    assert torch.equal(graph.indices, edges.cols)
    empty, none = csr_from_edges(*strongest_edges(torch.zeros(0, 0), 2), nodes=0)
    assert (empty.nodes, empty.edges, none.numel()) == (0, 0, 0)


def test_csr_from_edges_refuses() -> None:
    one, value = torch.tensor([1]), torch.tensor([0.5])
    with pytest.raises(NativeError, match=r"cols must be in \[0, 1\), got 1 at edge 0"):
        csr_from_edges(one - 1, one, value, 1)
    with pytest.raises(ValueError, match="float32 values"):
        csr_from_edges(one, one, value.double(), 2)
    with pytest.raises(ValueError, match="must be \\[M\\]"):
        csr_from_edges(one, one, value[:0], 2)
    with pytest.raises(ValueError, match="rows must be a contiguous int64 vector"):
        csr_from_edges(one.int(), one, value, 2)
    with pytest.raises(ValueError, match="on the CPU"):
        csr_from_edges(one.to("meta"), one, value, 2)
    with pytest.raises(ValueError, match="nodes must be at least 0, got -1"):
        csr_from_edges(one, one, value, -1)
