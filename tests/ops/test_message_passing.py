from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from onp.errors import NotBuiltError
from onp.ops import message_passing_triton, reference
from onp.ops.csr import CsrGraph, block_diagonal
from onp.ops.message_passing import message_passing

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# nodes, edges, batch, features
SHAPES = [
    pytest.param((1, 0, 1, 1), id="one-node"),
    pytest.param((0, 0, 2, 3), id="no-nodes"),
    pytest.param((5, 11, 0, 4), id="no-batch"),
    pytest.param((5, 11, 2, 0), id="no-features"),
    pytest.param((7, 0, 2, 5), id="no-edges"),
    pytest.param((3, 40, 2, 1), id="dense-with-repeats"),
    pytest.param((35, 100, 2, 9), id="odd"),
    pytest.param((13, 70, 1, 173), id="wide"),
    pytest.param((16, 90, 2, 64), id="even"),
]


def random_graph(nodes: int, edges: int, seed: int = 0) -> CsrGraph:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(max(nodes, 1), (edges,), generator=generator)
    indptr = torch.zeros(nodes + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)[:nodes]
    return CsrGraph.from_csr(indptr, torch.randint(max(nodes, 1), (edges,), generator=generator))


def random_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, CsrGraph]:
    nodes, edges, batch, features = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, nodes, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(edges, generator=generator, dtype=torch.float64)
    graph = random_graph(nodes, edges).to(device)
    return (
        x.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        graph,
    )


def forward_and_gradients(
    x: Tensor, weight: Tensor, graph: CsrGraph, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    out = message_passing(x, weight, graph, backend)
    target = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    x_grad, weight_grad = torch.autograd.grad((out * target).sum(), (x, weight))
    return out.detach(), x_grad, weight_grad


def assert_matches_reference(
    x: Tensor, weight: Tensor, graph: CsrGraph, backend: str, rtol: float, atol: float
) -> None:
    got = forward_and_gradients(x, weight, graph, backend)
    exact = forward_and_gradients(
        x.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        graph,
        "torch",
    )
    for actual, expected in zip(got, exact, strict=True):
        assert actual.dtype == x.dtype
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float32, 1e-4, 1e-4), (torch.float64, 1e-11, 1e-11), (torch.bfloat16, 2e-2, 1e-1)],
    ids=["f32", "f64", "bf16"],
)
def test_native_matches_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, rtol: float, atol: float
) -> None:
    assert_matches_reference(*random_inputs(shape, dtype), "native", rtol, atol)


def test_native_bfloat16_is_rounded_once() -> None:
    """What is computed is the sum in float32, rounded as torch rounds: ties to even, NaN to NaN."""
    x, weight, graph = random_inputs((40, 300, 2, 24), torch.bfloat16)
    x = x.detach()
    x[0, 3, 5], x[1, 7, 0] = torch.nan, torch.inf
    exact = message_passing(x.float(), weight.detach().float(), graph, "native")
    got = message_passing(x, weight.detach(), graph, "native")
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got.nan_to_num(0), exact.bfloat16().nan_to_num(0))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_triton_matches_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (2e-2, 1e-1)
    x, weight, graph = random_inputs(shape, dtype, TRITON_DEVICE)
    assert_matches_reference(x, weight, graph, "triton", rtol, atol)


@pytest.mark.parametrize("config", message_passing_triton.SUM_CONFIGS, ids=str)
def test_every_triton_config_of_sums(config: object) -> None:
    kernels = message_passing_triton
    assert isinstance(config, kernels.triton.Config)
    x, weight, graph = random_inputs((19, 90, 2, 130), device=TRITON_DEVICE)
    batch, nodes, features = x.shape
    out = torch.full_like(x, torch.nan)
    kernels.sum_kernel.fn[(batch * -(-nodes // config.kwargs["ROWS"]), -(-features // 64))](
        x.detach(), weight.detach(), graph.indptr, graph.indices, out, nodes, features,
        FEATURES=64, **config.kwargs, num_warps=config.num_warps,
    )  # fmt: skip
    expected = reference.message_passing(x, weight, graph.indptr, graph.indices)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", message_passing_triton.CONFIGS, ids=str)
def test_every_triton_config_of_weight_gradients(config: object) -> None:
    kernels = message_passing_triton
    assert isinstance(config, kernels.triton.Config)
    x, weight, graph = random_inputs((19, 90, 2, 130), device=TRITON_DEVICE)
    batch, nodes, features = x.shape
    expected = reference.message_passing(x, weight, graph.indptr, graph.indices)
    grad = torch.randn_like(expected)
    weight_grad = torch.full_like(weight, torch.nan)
    kernels.weight_grad_kernel.fn[(nodes,)](
        grad, x.detach(), graph.indptr, graph.indices, weight_grad, batch, nodes * features,
        features, **config.kwargs, num_warps=config.num_warps,
    )  # fmt: skip
    expected_grad = torch.autograd.grad(expected, weight, grad)[0]
    torch.testing.assert_close(weight_grad, expected_grad, rtol=1e-4, atol=1e-3)


def test_interpreter_gets_one_config() -> None:
    kernels = message_passing_triton
    for kernel, configs in (
        (kernels.sum_kernel, kernels.SUM_CONFIGS),
        (kernels.weight_grad_kernel, kernels.CONFIGS),
    ):
        assert len(kernel.configs) == (1 if kernels.INTERPRETED else len(configs))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_gradients_of_first_and_second_order(backend: str) -> None:
    x, weight, graph = random_inputs((6, 17, 2, 3), torch.float64)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return message_passing(x, weight, graph, backend)

    assert torch.autograd.gradcheck(run, (x, weight))
    assert torch.autograd.gradgradcheck(run, (x, weight))


GRADIENTS = ["message_passing_x_grad", "message_passing_weight_grad", "message_passing_gradients"]


def inputs_of(op: str, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What an operator takes before the graph: gradients of the output are other features."""
    other = x.detach().flip(0).requires_grad_()
    if op == "message_passing_gradients":
        return other, x, weight
    return (x, other) if op == "message_passing_weight_grad" else (x, weight)


@pytest.mark.parametrize(
    ("kernels", "device"), [("native", "cpu"), ("triton", TRITON_DEVICE)], ids=["native", "triton"]
)
@pytest.mark.parametrize("op", ["message_passing", *GRADIENTS])
def test_opcheck(op: str, kernels: str, device: str) -> None:
    x, weight, graph = random_inputs((9, 30, 2, 5), device=device)
    overload = getattr(torch.ops.onp, op).default
    torch.library.opcheck(overload, (*inputs_of(op, x, weight), *graph.tensors(), kernels))


@pytest.mark.parametrize("shape", [(35, 100, 2, 9), (35, 100, 2, 70)], ids=str)
@pytest.mark.parametrize("op", GRADIENTS)
def test_gradient_operators_match_their_twins(op: str, shape: tuple[int, int, int, int]) -> None:
    x, weight, graph = random_inputs(shape)
    given = inputs_of(op, x, weight)
    got = getattr(torch.ops.onp, op)(*given, *graph.tensors(), "native")
    expected = getattr(reference, op)(*given, graph.indptr, graph.indices)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_single_gradient_is_what_both_are() -> None:
    x, weight, graph = random_inputs((35, 100, 2, 40))
    _, *both = forward_and_gradients(x, weight, graph, "native")
    out = message_passing(x, weight.detach(), graph)
    target = torch.linspace(-1, 1, out.numel()).view(out.shape)
    torch.testing.assert_close(torch.autograd.grad((out * target).sum(), x)[0], both[0])
    out = message_passing(x.detach(), weight, graph)
    torch.testing.assert_close(torch.autograd.grad((out * target).sum(), weight)[0], both[1])


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
def test_second_order_of_some_gradients(which: tuple[int, ...]) -> None:
    """Gradients of gradients of which some do not count, against plain torch."""
    x, weight, graph = random_inputs((9, 30, 2, 5), torch.float64)

    def twice(backend: str) -> tuple[Tensor, ...]:
        out = message_passing(x, weight, graph, backend)
        first = torch.autograd.grad(out.square().sum(), (x, weight), create_graph=True)
        loss = sum((first[i].square().sum() for i in which), torch.zeros(()))
        return torch.autograd.grad(loss, (x, weight))

    for got, expected in zip(twice("native"), twice("torch"), strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_of_a_view() -> None:
    """What comes back may be expanded or turned."""
    x, weight, graph = random_inputs((12, 50, 2, 7), torch.float64)
    for grad in (
        torch.ones(1, 1, 1).double().expand(x.shape),
        torch.rand(7, 12, 2).double().permute(2, 1, 0),
    ):
        got = torch.autograd.grad(message_passing(x, weight, graph), (x, weight), grad)
        expected = torch.autograd.grad(
            message_passing(x, weight, graph, "torch"), (x, weight), grad
        )
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_gradients_refuse_what_does_not_fit() -> None:
    x, weight, graph = random_inputs((9, 30, 2, 5))
    both = torch.ops.onp.message_passing_gradients
    with pytest.raises(ValueError, match=r"grad must be torch.float32 \(2, 9, 5\), got .*float64"):
        both(x.double(), x, weight, *graph.tensors(), "native")
    with pytest.raises(ValueError, match=r"weight must be \[30\]"):
        both(x, x, weight[:-1], *graph.tensors(), "native")


@pytest.mark.usefixtures("two_threads")
def test_thread_count_does_not_change_a_bit() -> None:
    x, weight, graph = random_inputs((501, 6000, 3, 37))
    two = forward_and_gradients(x, weight, graph, "native")
    torch.set_num_threads(1)
    one = forward_and_gradients(x, weight, graph, "native")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_non_contiguous_inputs(backend: str) -> None:
    x, weight, graph = random_inputs((12, 50, 2, 7), device=TRITON_DEVICE)
    wide = x.detach().repeat_interleave(2, dim=2)[:, :, ::2]
    sliced = weight.detach().repeat_interleave(3)[::3]
    assert not wide.is_contiguous()
    assert not sliced.is_contiguous()
    if backend == "native":
        wide, sliced, graph = wide.cpu(), sliced.cpu(), graph.to("cpu")
    torch.testing.assert_close(
        message_passing(wide, sliced, graph, backend),
        message_passing(wide, sliced, graph, "torch"),
        rtol=1e-5,
        atol=1e-5,
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=4))
def test_block_diagonal_is_one_graph_after_the_other(sizes: list[tuple[int, int]]) -> None:
    graphs = [random_graph(nodes, edges, seed) for seed, (nodes, edges) in enumerate(sizes)]
    joined = block_diagonal(graphs)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            joined.tensors(),
            CsrGraph.from_csr(joined.indptr, joined.indices).tensors(),
            strict=True,
        )
    )
    features = [torch.randn(1, graph.nodes, 3) for graph in graphs]
    weights = [torch.randn(graph.edges) for graph in graphs]
    together = message_passing(torch.cat(features, 1), torch.cat(weights), joined)
    apart = [
        message_passing(x, weight, graph)
        for x, weight, graph in zip(features, weights, graphs, strict=True)
    ]
    assert torch.equal(together, torch.cat(apart, 1))


def test_compiles_without_a_graph_break() -> None:
    x, weight, graph = random_inputs((9, 30, 2, 5))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return message_passing(x, weight, graph).relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), run(x, weight))
    got = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad(run(x, weight).sum(), (x, weight)))


@pytest.mark.parametrize("pointer", ["*fp32", "*bf16"])
def test_triton_kernels_compile_for_cuda(pointer: str, tmp_path: Path) -> None:
    program = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onp.ops import message_passing_triton as kernels

for kernel, configs in (
    (kernels.sum_kernel.fn, kernels.SUM_CONFIGS), (kernels.weight_grad_kernel.fn, kernels.CONFIGS)
):
    for config in configs:
        chosen = config.kwargs | ({"FEATURES": 64} if "ROWS" in config.kwargs else {})
        types = {name: sys.argv[1] for name in kernel.arg_names}
        types |= dict.fromkeys(("indptr", "indices"), "*i64")
        types |= dict.fromkeys(("batch", "batch_stride", "nodes", "features"), "i64")
        types |= dict.fromkeys(chosen, "constexpr")
        source = ASTSource(
            kernel,
            {name: types[name] for name in kernel.arg_names},
            {(kernel.arg_names.index(name),): value for name, value in chosen.items()},
        )
        options = {"num_warps": config.num_warps}
        target = GPUTarget("cuda", 90, 32)
        assert triton.compile(source, target=target, options=options).asm["cubin"]
"""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", program, pointer], check=True, env=environment)


@pytest.mark.parametrize("seed", range(3))
def test_transpose_matches_reference(seed: int) -> None:
    graph = random_graph(13, 70, seed)
    expected = reference.csr_transpose(graph.indptr, graph.indices)
    for got, want in zip((graph.t_indptr, graph.t_indices, graph.t_edge), expected, strict=True):
        assert torch.equal(got, want)


def test_torch_scatter_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, graph = random_inputs((9, 30, 2, 5))
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    with pytest.raises(NotBuiltError, match="torch-scatter"):
        message_passing(x, weight, graph, "torch_scatter")

    def scatter(src: Tensor, index: Tensor, dim: int, dim_size: int, reduce: str) -> Tensor:
        shape = [1] * src.ndim
        shape[dim] = -1
        out = src.new_zeros([*src.shape[:dim], dim_size, *src.shape[dim + 1 :]])
        assert reduce == "sum"
        return out.scatter_add(dim, index.view(shape).expand_as(src), src)

    stand_in = types.ModuleType("torch_scatter")
    monkeypatch.setattr(stand_in, "scatter", scatter, raising=False)
    monkeypatch.setitem(sys.modules, "torch_scatter", stand_in)
    torch.testing.assert_close(
        message_passing(x, weight, graph, "torch_scatter"),
        message_passing(x, weight, graph, "torch"),
    )


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, graph = random_inputs((9, 30, 2, 5), device=TRITON_DEVICE)
    monkeypatch.delattr("onp.ops.message_passing_triton")
    monkeypatch.delitem(sys.modules, "onp.ops.message_passing_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NotBuiltError, match="Triton is not installed"):
        message_passing(x, weight, graph, "triton")


def test_native_work_does_not_import_triton() -> None:
    program = """
import sys, torch
torch.set_num_threads(1)
from onp.ops.csr import CsrGraph
from onp.ops.message_passing import message_passing
graph = CsrGraph.from_csr(torch.tensor([0, 1, 2]), torch.tensor([1, 0]))
before = "triton" in sys.modules
out = message_passing(torch.ones(1, 2, 3, requires_grad=True), torch.ones(2), graph)
out.sum().backward()
assert "onp.ops.message_passing_triton" not in sys.modules
assert ("triton" in sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 5)}, r"features must be \[B, 9, D\]"),
        ({"x": torch.zeros(2, 8, 5)}, r"features must be \[B, 9, D\]"),
        ({"weight": torch.zeros(29)}, r"weight must be \[30\]"),
        ({"weight": torch.zeros(30, dtype=torch.float64)}, "one floating dtype"),
        (
            {"x": torch.zeros(2, 9, 5).half(), "weight": torch.zeros(30).half()},
            "native kernels take .* or torch.bfloat16, got torch.float16",
        ),
        ({"x": torch.zeros(2, 9, 5, device="meta")}, "one device"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    x, weight, graph = random_inputs((9, 30, 2, 5))
    arguments: dict[str, object] = {"x": x, "weight": weight, "graph": graph, "backend": "auto"}
    with pytest.raises(ValueError, match=message):
        message_passing(**(arguments | change))  # type: ignore[arg-type]


def test_triton_refuses_doubles() -> None:
    x, weight, graph = random_inputs((9, 30, 2, 5), torch.float64, TRITON_DEVICE)
    with pytest.raises(ValueError, match="triton kernels take"):
        message_passing(x, weight, graph, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_cuda_tensors_on_another_stream(dtype: torch.dtype) -> None:
    x, weight, graph = random_inputs((501, 6000, 3, 70), dtype, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = forward_and_gradients(x, weight, graph, "auto")
        again = forward_and_gradients(x, weight, graph, "auto")
    torch.cuda.current_stream().wait_stream(stream)
    expected = forward_and_gradients(
        x.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        graph,
        "torch",
    )
    tolerance = 1e-3 if dtype == torch.float32 else 2e-1
    for first, second, exact in zip(got, again, expected, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), exact, rtol=tolerance, atol=tolerance)
