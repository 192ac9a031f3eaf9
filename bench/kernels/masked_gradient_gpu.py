"""Gradients by the images on a GPU, a step of a probe: ours, replayed from a CUDA graph, against
the network in torch, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.kernels.gate import timed
from bench.kernels.masked_forward import LAST, NETWORKS, settled
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row
from bench.zoo.architectures import ARCHITECTURES
from onp.suspect.network import REPLAYED_FROM, FrozenNetwork
from onp.suspect.trace import trace

CASES = ("preactresnet18-64", "preactresnet18-16")
IMAGES, CLASSES = 128, 10
TARGET = 1.5
TOLERANCE = 3e-2
"""Of the largest gradient: all are in TF32."""


def gradients(network: Callable[[Tensor], Tensor], images: Tensor, pull: Tensor) -> list[Tensor]:
    """By images [N, C, H, W] of logits weighted by pull [N, K]."""
    leaf = images.detach().requires_grad_(True)
    return list(torch.autograd.grad(network(leaf), leaf, pull))


def rows(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:  # noqa: ARG001
    """Every network."""
    for name in CASES[: 1 if quick else None]:
        arch, width, _ = NETWORKS[name]
        torch.manual_seed(0)
        model = settled(ARCHITECTURES[arch](width, CLASSES)).requires_grad_(False)
        images = torch.rand(IMAGES, 3, 32, 32, device="cuda").contiguous(memory_format=LAST)
        pull = torch.randn(IMAGES, CLASSES, device="cuda")
        ours = FrozenNetwork(trace(model, (3, 32, 32)), model, "cuda")
        plain = copy.deepcopy(model).to("cuda", memory_format=LAST)
        double = copy.deepcopy(model).to("cuda", torch.float64)
        expected = [one.float() for one in gradients(double, images.double(), pull.double())]
        for _ in range(REPLAYED_FROM):
            gradients(ours, images, pull)
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "onp": ours,
            "torch eager, channels last": plain,
            "torch.compile": torch.compile(plain),
            "torch.compile, CUDA graphs": torch.compile(plain, mode="reduce-overhead"),
        }
        for way, network in ways.items():
            row = Row("masked_gradient", f"{name}, {IMAGES} images", way, "tf32", None, False)
            row = replace(row, target=TARGET if way == "onp" else None)
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
                run = partial(gradients, network, images, pull)
                yield timed(row, run, expected, 10 * repeats, TOLERANCE)
