"""Weighted neighbour sums over one graph for a batch of feature matrices.

``out[b, i, :]`` is the sum over the edges e in row i of ``weight[e] * x[b, indices[e], :]``.

Registered as ``onp::message_passing`` with its gradients, so that torch.compile and autograd
see them: the gradient of x is the same sum over the transposed graph (no atomics), that of a
weight is a dot product per edge; both together are one pass that reads each row of the output's
gradient once an edge. Gradients are again these operators, so they are differentiable any number of
times. CPU tensors run native code, CUDA tensors run Triton.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from onp import _C
from onp.errors import NotBuiltError
from onp.ops import reference
from onp.ops._library import LIBRARY
from onp.ops.csr import CsrGraph

BACKENDS = ("auto", "native", "triton", "torch", "torch_scatter")
_NATIVE_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
}
"""What the native module calls them."""
_TRITON_DTYPES = (torch.float32, torch.bfloat16)

_GRAPH = "Tensor indptr, Tensor indices, Tensor t_indptr, Tensor t_indices, Tensor t_edge"
# `kernels` is "native" or "triton"; Triton on the CPU exists under its interpreter alone.
LIBRARY.define(f"message_passing(Tensor x, Tensor weight, {_GRAPH}, str kernels) -> Tensor")
LIBRARY.define(
    f"message_passing_x_grad(Tensor grad, Tensor weight, {_GRAPH}, str kernels) -> Tensor"
)
LIBRARY.define(
    f"message_passing_weight_grad(Tensor grad, Tensor x, {_GRAPH}, str kernels) -> Tensor"
)
LIBRARY.define(
    "message_passing_gradients(Tensor grad, Tensor x, Tensor weight, "
    f"{_GRAPH}, str kernels) -> (Tensor, Tensor)"
)


def message_passing(x: Tensor, weight: Tensor, graph: CsrGraph, backend: str = "auto") -> Tensor:
    """Sum each node's neighbours, weighted by edge.

    Args:
        x: node features ``[B, N, D]``. float32, float64 or bfloat16 on the CPU (native), float32
            or bfloat16 on CUDA (Triton); bfloat16 with float32 sums. Differentiable.
        weight: edge weights ``[E]`` of the same dtype and device. Differentiable.
        graph: the graph, shared by all B, on the same device.
        backend: ``auto`` (by device), ``native``, ``triton`` (on CPU tensors under
            ``TRITON_INTERPRET=1`` alone), ``torch`` (plain torch operations, any floating dtype)
            or ``torch_scatter`` (that package's ``scatter``).

    Returns:
        ``[B, N, D]`` of x's dtype. Native and Triton results do not depend on the number of
        threads and are the same in every run on one machine.

    Raises:
        ValueError: wrong shapes, dtypes or devices, or an unknown backend.
        NotBuiltError: the backend's package is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"message_passing: backend must be one of {BACKENDS}, got {backend!r}")
    _check("message_passing", x, weight, *graph.tensors())
    if backend == "auto":
        backend = "native" if x.device.type == "cpu" else _gpu_backend()
    if backend == "torch":
        return reference.message_passing(x, weight, graph.indptr, graph.indices)
    if backend == "torch_scatter":
        return _torch_scatter(x, weight, graph)
    out: Tensor = torch.ops.onp.message_passing(x, weight, *graph.tensors(), backend)
    return out


@cache
def _gpu_backend() -> str:
    """What a GPU's tensors are left to: without Triton torch."""
    return "torch" if importlib.util.find_spec("triton") is None else "triton"


# ---- validation, shared by the fake and the real implementations ---------------------------------


def _check(op: str, x: Tensor, weight: Tensor, *graph: Tensor) -> None:
    """Shapes, dtypes and devices; ``x`` is any ``[B, N, D]`` and ``weight`` any ``[E]``."""
    indptr, indices = graph[0], graph[1]
    if x.ndim != 3 or x.shape[1] != indptr.shape[0] - 1:
        raise ValueError(
            f"{op}: features must be [B, {indptr.shape[0] - 1}, D] for this graph, "
            f"got {tuple(x.shape)}"
        )
    if weight.shape != indices.shape:
        raise ValueError(
            f"{op}: weight must be [{indices.shape[0]}] for this graph, got {tuple(weight.shape)}"
        )
    if not x.is_floating_point() or weight.dtype != x.dtype:
        raise ValueError(
            f"{op}: features and weight must have one floating dtype, "
            f"got {x.dtype} and {weight.dtype}"
        )
    devices = {tensor.device for tensor in (x, weight, *graph)}
    if len(devices) != 1:
        raise ValueError(
            f"{op}: features, weight and graph must be on one device, "
            f"got {sorted(map(str, devices))}"
        )


def _check_kernels(op: str, x: Tensor, kernels: str) -> None:
    if kernels not in ("native", "triton"):
        raise ValueError(f"{op}: kernels must be 'native' or 'triton', got {kernels!r}")
    if kernels == "native" and x.device.type != "cpu":
        raise ValueError(f"{op}: native kernels need CPU tensors, got {x.device}")
    dtypes = _NATIVE_DTYPES if kernels == "native" else _TRITON_DTYPES
    if x.dtype not in dtypes:
        raise ValueError(
            f"{op}: {kernels} kernels take {' or '.join(map(str, dtypes))}, got {x.dtype} "
            "(backend='torch' takes any)"
        )


# ---- implementations -----------------------------------------------------------------------------


def _triton() -> Any:
    """The Triton kernels, imported when a call needs them."""
    try:
        from onp.ops import message_passing_triton
    except ModuleNotFoundError as error:
        raise NotBuiltError(
            "message_passing: Triton is not installed: install the extra 'gpu' of onp, "
            "or move the tensors to the CPU"
        ) from error
    return message_passing_triton


def _sum(x: Tensor, weight: Tensor, indptr: Tensor, indices: Tensor, kernels: str) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    batch, nodes, features = x.shape
    out = torch.empty_like(x)
    if kernels == "triton":
        _triton().launch_sum(x, weight, indptr, indices, out)
        return out
    _C.message_passing(
        _NATIVE_DTYPES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        indptr.data_ptr(),
        indices.data_ptr(),
        out.data_ptr(),
        batch,
        nodes,
        features,
        torch.get_num_threads(),
    )
    return out


def _forward(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *graph, kernels = rest
    _check("message_passing", x, weight, *graph)
    _check_kernels("message_passing", x, kernels)
    return _sum(x, weight, graph[0], graph[1], kernels)


def _x_grad(grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *graph, kernels = rest
    _check("message_passing_x_grad", grad, weight, *graph)
    _check_kernels("message_passing_x_grad", grad, kernels)
    _, _, t_indptr, t_indices, t_edge = graph
    return _sum(grad, weight.index_select(0, t_edge), t_indptr, t_indices, kernels)


def _weight_grad(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *graph, kernels = rest
    indptr, indices = graph[0], graph[1]
    _check_weight_grad(grad, x, *graph)
    _check_kernels("message_passing_weight_grad", grad, kernels)
    grad, x = grad.contiguous(), x.contiguous()
    batch, nodes, features = x.shape
    weight_grad = torch.empty(indices.shape[0], dtype=x.dtype, device=x.device)
    if kernels == "triton":
        _triton().launch_weight_grad(grad, x, indptr, indices, weight_grad)
        return weight_grad
    _C.message_passing_weight_grad(
        _NATIVE_DTYPES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        indptr.data_ptr(),
        indices.data_ptr(),
        weight_grad.data_ptr(),
        batch,
        nodes,
        features,
        torch.get_num_threads(),
    )
    return weight_grad


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Of features and of weights."""
    *graph, kernels = rest
    _check_gradients(grad, x, weight, *graph)
    _check_kernels("message_passing_gradients", grad, kernels)
    if kernels != "native":
        return _x_grad(grad, weight, *rest), _weight_grad(grad, x, *rest)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    _, _, t_indptr, t_indices, t_edge = graph
    batch, nodes, features = x.shape
    x_grad, weight_grad = torch.empty_like(x), torch.empty_like(weight)
    _C.message_passing_gradients(
        _NATIVE_DTYPES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        t_indptr.data_ptr(),
        t_indices.data_ptr(),
        t_edge.data_ptr(),
        x_grad.data_ptr(),
        weight_grad.data_ptr(),
        batch,
        nodes,
        features,
        torch.get_num_threads(),
    )
    return x_grad, weight_grad


def _check_gradients(grad: Tensor, x: Tensor, weight: Tensor, *graph: Tensor) -> None:
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(
            f"message_passing_gradients: grad must be {x.dtype} {tuple(x.shape)}, "
            f"got {grad.dtype} {tuple(grad.shape)}"
        )
    for features in (grad, x):
        _check("message_passing_gradients", features, weight, *graph)


def _check_weight_grad(grad: Tensor, x: Tensor, *graph: Tensor) -> None:
    if grad.shape != x.shape:
        raise ValueError(
            f"message_passing_weight_grad: grad must be {tuple(x.shape)}, got {tuple(grad.shape)}"
        )
    _check("message_passing_weight_grad", grad, x.new_empty(graph[1].shape), *graph)


def _fake_features(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *graph, kernels = rest
    _check("message_passing", x, weight, *graph)
    _check_kernels("message_passing", x, kernels)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_weight_grad(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *graph, kernels = rest
    _check_weight_grad(grad, x, *graph)
    _check_kernels("message_passing_weight_grad", grad, kernels)
    return x.new_empty(graph[1].shape)


def _fake_gradients(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *graph, kernels = rest
    _check_gradients(grad, x, weight, *graph)
    _check_kernels("message_passing_gradients", grad, kernels)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    )


def _torch_scatter(x: Tensor, weight: Tensor, graph: CsrGraph) -> Tensor:
    try:
        import torch_scatter
    except ModuleNotFoundError as error:
        raise NotBuiltError(
            "message_passing: backend 'torch_scatter' needs the package torch-scatter, "
            "which is not installed"
        ) from error
    rows = reference.csr_rows(graph.indptr)
    messages = weight[:, None] * x[:, graph.indices]
    out: Tensor = torch_scatter.scatter(messages, rows, dim=1, dim_size=graph.nodes, reduce="sum")
    return out


# ---- gradients -----------------------------------------------------------------------------------
#
# With A(w) the N x N matrix of the weights: forward is A(w) x, x_grad is A(w)^T g, and
# weight_grad[e] is <g[row e], x[col e]>. All three are bilinear in their first two inputs;
# `gradients` gives the latter two.


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.kernels = inputs
    ctx.save_for_backward(*tensors)


def _no_grads(count: int) -> tuple[None, ...]:
    return (None,) * count


def _forward_backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *graph = ctx.saved_tensors
    ops, rest = torch.ops.onp, (*graph, ctx.kernels)
    if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
        both = ops.message_passing_gradients(out_grad, x, weight, *rest)
        return (*both, *_no_grads(len(rest)))
    return (
        ops.message_passing_x_grad(out_grad, weight, *rest) if ctx.needs_input_grad[0] else None,
        ops.message_passing_weight_grad(out_grad, x, *rest) if ctx.needs_input_grad[1] else None,
        *_no_grads(len(rest)),
    )


def _x_grad_backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight, *graph = ctx.saved_tensors
    ops, rest = torch.ops.onp, (*graph, ctx.kernels)
    return (
        ops.message_passing(out_grad, weight, *rest) if ctx.needs_input_grad[0] else None,
        ops.message_passing_weight_grad(grad, out_grad, *rest) if ctx.needs_input_grad[1] else None,
        *_no_grads(len(rest)),
    )


def _weight_grad_backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, *graph = ctx.saved_tensors
    ops, rest = torch.ops.onp, (*graph, ctx.kernels)
    return (
        ops.message_passing(x, out_grad, *rest) if ctx.needs_input_grad[0] else None,
        ops.message_passing_x_grad(grad, out_grad, *rest) if ctx.needs_input_grad[1] else None,
        *_no_grads(len(rest)),
    )


def _save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)  # what does not count is None, and costs nothing
    _save_inputs(ctx, inputs, output)


def _gradients_backward(
    ctx: Any, of_x_grad: Tensor | None, of_weight_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad, x, weight, *graph = ctx.saved_tensors
    ops, rest, needs = torch.ops.onp, (*graph, ctx.kernels), ctx.needs_input_grad
    to_grad: Tensor | None = None
    to_x: Tensor | None = None
    to_weight: Tensor | None = None
    if of_x_grad is not None:
        to_grad = ops.message_passing(of_x_grad, weight, *rest) if needs[0] else None
        to_weight = ops.message_passing_weight_grad(grad, of_x_grad, *rest) if needs[2] else None
    if of_weight_grad is not None:
        if needs[0]:
            more = ops.message_passing(x, of_weight_grad, *rest)
            to_grad = more if to_grad is None else to_grad + more
        to_x = ops.message_passing_x_grad(grad, of_weight_grad, *rest) if needs[1] else None
    return to_grad, to_x, to_weight, *_no_grads(len(rest))


for _name, _implementation, _fake, _backward, _save in (
    ("message_passing", _forward, _fake_features, _forward_backward, _save_inputs),
    ("message_passing_x_grad", _x_grad, _fake_features, _x_grad_backward, _save_inputs),
    (
        "message_passing_weight_grad",
        _weight_grad,
        _fake_weight_grad,
        _weight_grad_backward,
        _save_inputs,
    ),
    (
        "message_passing_gradients",
        _gradients,
        _fake_gradients,
        _gradients_backward,
        _save_for_gradients,
    ),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"onp::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"onp::{_name}", _backward, setup_context=_save, lib=LIBRARY)
