"""Naive twins of every native operation: obvious, slow, and importing torch alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# ---- message passing ----------------------------------------------------------------------------


def csr_rows(indptr: Tensor) -> Tensor:
    """The row of every edge, ``[E]``, of a CSR graph with ``indptr [N + 1]``."""
    nodes = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(nodes, indptr.diff())


def message_passing(x: Tensor, weight: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """``[B, N, D]``: for each row the sum of ``weight[e] * x[b, indices[e]]`` over its edges."""
    messages = weight[:, None] * x[:, indices]
    return torch.zeros_like(x).index_add(1, csr_rows(indptr), messages)


def message_passing_x_grad(grad: Tensor, weight: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """``[B, N, D]``: the gradient of x, ``weight[e] * grad[b, row]`` added to each column."""
    messages = weight[:, None] * grad[:, csr_rows(indptr)]
    return torch.zeros_like(grad).index_add(1, indices, messages)


def message_passing_weight_grad(grad: Tensor, x: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """``[E]``: the gradient of each weight, the dot product of ``grad`` and x at its ends."""
    return (grad[:, csr_rows(indptr)] * x[:, indices]).sum((0, 2))


def message_passing_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, indptr: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight."""
    return (
        message_passing_x_grad(grad, weight, indptr, indices),
        message_passing_weight_grad(grad, x, indptr, indices),
    )


def csr_transpose(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(t_indptr, t_indices, t_edge)`` of a CSR graph, rows in ascending order."""
    t_edge = torch.argsort(indices, stable=True)
    counts = torch.bincount(indices, minlength=indptr.numel() - 1)
    t_indptr = torch.cat([indptr[:1], counts.cumsum(0)])
    return t_indptr, csr_rows(indptr)[t_edge], t_edge


# ---- neuron graph -------------------------------------------------------------------------------


def connection_strength(weight: Tensor) -> Tensor:
    """``[O, I]``: the sum of ``|weight|`` over the kernel of ``[O, I, *K]``."""
    return weight.abs().unsqueeze(-1).flatten(2).sum(2)


def strongest_edges(strength: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positive entries among the k strongest of their row or column, lower index first."""
    return _choose(strength, strength > 0, k)


def similarity_edges(
    vectors: Tensor, threshold: float, max_neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs over the threshold that either end counts among its most similar."""
    norms = vectors.double().square().sum(1).sqrt()
    usable = (norms > 0) & norms.isfinite()
    units = torch.where(usable[:, None], vectors.double() / norms[:, None], 0.0)
    similarity = (units @ units.T).clamp(-1, 1)
    allowed = (similarity >= threshold) & usable[:, None] & usable[None, :]
    allowed.fill_diagonal_(False)
    return _choose(similarity, allowed, max_neighbours)


def _choose(matrix: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = set()
    for row in range(matrix.shape[0]):
        chosen |= {(row, col) for col in _strongest(matrix[row], allowed[row], k)}
    for col in range(matrix.shape[1]):
        chosen |= {(row, col) for row in _strongest(matrix[:, col], allowed[:, col], k)}
    pairs = torch.tensor(sorted(chosen), dtype=torch.int64).view(-1, 2)
    rows, cols = pairs[:, 0], pairs[:, 1]
    return rows, cols, matrix[rows, cols].float()


def _strongest(values: Tensor, allowed: Tensor, k: int) -> list[int]:
    candidates = [i for i in range(values.numel()) if allowed[i]]
    return sorted(candidates, key=lambda i: (-values[i].item(), i))[:k]


def csr_from_edges(
    rows: Tensor, cols: Tensor, values: Tensor, nodes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(indptr, indices, values)`` sorted by (row, column), repeated edges added."""
    sums: dict[tuple[int, int], Tensor] = {}
    for row, col, value in zip(rows.tolist(), cols.tolist(), values, strict=True):
        sums[row, col] = sums.get((row, col), torch.zeros(())) + value
    indptr = torch.zeros(nodes + 1, dtype=torch.int64)
    for row, _ in sums:
        indptr[row + 1 :] += 1
    edges = sorted(sums)
    indices = torch.tensor([col for _, col in edges], dtype=torch.int64)
    return indptr, indices, torch.tensor([sums[edge].item() for edge in edges])


# ---- masked forward -----------------------------------------------------------------------------


def masked_forward(
    model: nn.Module,
    layers: Sequence[tuple[slice, Sequence[str]]],
    pruned: Tensor,
    images: Tensor,
) -> Tensor:
    """Logits ``[B, N, K]`` of ``model`` under each of ``pruned`` bool ``[B, S]``.

    A layer is its slice of the sites and the names of the modules that consume it: the pruned
    channels of their input are zeroed. A linear layer reads its channels last; behind a flatten it
    has one input for each pixel of a channel.
    """

    def logits(mask: Tensor) -> Tensor:
        masked = copy.deepcopy(model)
        for sites, consumers in layers:
            keep = (~mask[sites]).to(images.dtype)
            for name in consumers:
                _zero_input(masked, name, keep)
        with torch.no_grad():
            result: Tensor = masked(images)
        return result

    return torch.stack([logits(mask) for mask in pruned])


def _zero_input(model: nn.Module, name: str, keep: Tensor) -> None:
    """Multiply the channels of a module's input by ``keep``."""
    module = model.get_submodule(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention):  # which reads its layer's weights, and calls none
        assert isinstance(module, nn.Linear)
        with torch.no_grad():
            module.weight *= keep
        return

    def zero(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if isinstance(module, nn.Conv2d):
            return (args[0] * keep.view(-1, 1, 1),)
        pixels = args[0].shape[-1] // len(keep)
        return tuple(one * keep.repeat_interleave(pixels) for one in args)  # of attention, three

    module.register_forward_pre_hook(zero)
