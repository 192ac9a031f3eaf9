"""A device that is not the CPU, on a machine that has none: ``python -m tests.other_device quick``.

Its tensors are CPU tensors inside, so that everything can run; but an operation that takes tensors
of both devices raises, as it would on a GPU. Off a GPU this is the one way to see that the whole
path keeps to one. Kernels are torch's or the CPU's: they are tested by themselves.
"""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import onp
from onp import demo
from onp.config import BUDGETS
from onp.probes.norm_shift import NormShift
from onp.verdict import Verdict

NAME = "other"
_setup_privateuseone_for_python_backend(NAME)  # of the whole process
DEVICE = torch.device(NAME, 0)
BETWEEN = ("aten.copy_.", "aten._to_copy.", "aten.index.", "aten.index_put_.", "aten._index_put")
"""Operations that may take tensors of both devices: copies, and what is picked by host indices."""
PICKING = BETWEEN[2:]


class OtherTensor(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        made: OtherTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatched(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Sees what makes tensors, which has none of them among its arguments."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on what is inside, and wrap what it gives."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [one for one in tensors if isinstance(one, OtherTensor)]
    host = [one for one in tensors if not isinstance(one, OtherTensor) and one.dim() > 0]
    name = str(func)
    picked_from_host = name.startswith(PICKING) and not isinstance(args[0], OtherTensor)
    if ours and host and (not name.startswith(BETWEEN) or picked_from_host):
        shapes = [[tuple(one.shape) for one in part] for part in (ours, host)]
        raise RuntimeError(f"{name} takes {shapes[0]} on {NAME} and {shapes[1]} on the CPU")

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, OtherTensor):
            return leaf.inner
        return "native" if isinstance(leaf, str) and leaf == "triton" else leaf

    device = kwargs.get("device")
    moved = kwargs if device is None else kwargs | {"device": "cpu"}
    out = func(*tree_map(inside, args), **tree_map(inside, moved))
    if ours and isinstance(args[0], OtherTensor) and out is args[0].inner:
        return args[0]  # changed in place
    if device is None:
        here = isinstance(args[0], OtherTensor) if name.startswith("aten.copy_") else bool(ours)
    else:
        here = torch.device(device).type == NAME

    def wrapped(leaf: Any) -> Any:
        is_host = isinstance(leaf, Tensor) and not isinstance(leaf, OtherTensor)
        return OtherTensor(leaf) if is_host and here else leaf

    return tree_map(wrapped, out)


def moved(model: nn.Module, *_: Any) -> tuple[nn.Module, torch.device]:
    """What ``onp.prepare.frozen_copy`` gives, on the device."""
    model = copy.deepcopy(model).float().eval()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = OtherTensor(parameter.detach())
                module._parameters[name] = nn.Parameter(own, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else OtherTensor(buffer)
    return model, DEVICE


def explained(self: NormShift, change: Tensor) -> Tensor:
    """As NormShift's, whose product squeezes a tensor in place, which wrapped ones do not see."""
    scaled = change / self.noise
    weights = torch.mv(self.solver, torch.mv(self.nuisances, scaled))
    return scaled - torch.mv(self.nuisances.T, weights)


def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """``torch.tensor``, which asks a backend for memory past all dispatch."""
    made: Tensor = _tensor(data, **options)
    return made if device is None else made.to(device)


_tensor = torch.tensor


def main() -> None:
    """Repair the demo's network, or its clean twin, on the device; prints what was found."""
    budget, clean = sys.argv[1], "clean" in sys.argv[2:]
    from tests.test_sanitize import clean_twin, suspect

    prepare = importlib.import_module("onp.prepare")
    prepare.frozen_copy = moved  # type: ignore[attr-defined]
    torch.tensor = tensor  # type: ignore[assignment]
    NormShift.explained = explained  # type: ignore[method-assign]
    model = clean_twin() if clean else suspect()
    config = BUDGETS[budget]
    config = replace(config, agent=replace(config.agent, steps=1))  # learning is there as well
    if clean:  # all is asked, and then a class is called, probed, raced and searched against
        order: Any = importlib.import_module("onp.evidence.order")
        order.from_shifting_squares = lambda _: None
        looks: Any = importlib.import_module("onp.evidence.looks")
        looks.by_margins = lambda *_: Verdict("backdoor", 1.0, 1, "margins", {}, "")
    with Device():
        result = onp.sanitize(model, demo.clean_images(), seed=0, budget=config, backend="torch")
    print(result.verdict, int(result.mask.sum()), sorted(result.report["seconds"]))


if __name__ == "__main__":
    main()
