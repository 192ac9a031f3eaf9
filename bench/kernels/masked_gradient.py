"""Gradients by the images, a step of a probe: ours against the network in torch, eager, compiled.

On a GPU ours are torch's, replayed from a CUDA graph, and all are in TF32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.kernels.gate import timed
from bench.kernels.masked_forward import BF16, FIRST, LAST, NETWORKS, OTHERS, settled
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row
from bench.zoo.architectures import ARCHITECTURES
from onp.suspect.network import REPLAYED_FROM, FrozenNetwork
from onp.suspect.trace import trace

CASES = {
    "cpu": (
        "preactresnet18-16", "resnet20-16", "mobilenetv2-1", "densenet-16", "convnext-32", "vit-64",
    ),
    "cuda": ("preactresnet18-64", "preactresnet18-16"),
}  # fmt: skip
IMAGES = {"cpu": 48, "cuda": 128}
TARGETS = {"cpu": 2.0, "cuda": 1.5}
CLASSES = 10
TOLERANCES = {"fp32": 2e-2, "tf32": 0.1, "reduced": 0.5}
"""Of the gradient's norm: at the kink of a ReLU it may pass on one side alone."""

Network = Callable[[Tensor], Tensor]


def gradients(network: Network, images: Tensor, pull: Tensor) -> list[Tensor]:
    """By images [N, C, H, W] of logits weighted by pull [N, K]."""
    leaf = images.detach().requires_grad_(True)
    return list(torch.autograd.grad(network(leaf).float(), leaf, pull))


def ways_of(model: nn.Module, device: str) -> Iterator[tuple[str, str, Network]]:
    """Name, precision and network of every implementation."""
    exact = "fp32" if device == "cpu" else "tf32"
    yield "onp", exact, FrozenNetwork(trace(model, (3, 32, 32)), model, device)
    plain = copy.deepcopy(model).to(device, memory_format=LAST)
    yield "torch eager, channels last", exact, plain
    yield "torch.compile", exact, torch.compile(plain)
    if device == "cuda":
        yield "torch.compile, CUDA graphs", exact, torch.compile(plain, mode="reduce-overhead")
        return
    yield "torch eager, NCHW", exact, copy.deepcopy(model).to(memory_format=FIRST)
    narrow = copy.deepcopy(model).to(torch.bfloat16, memory_format=LAST)
    yield "torch eager, bf16", "reduced", lambda images: narrow(images.bfloat16())
    compiled = torch.compile(narrow)
    yield "torch.compile, bf16", "reduced", lambda images: compiled(images.bfloat16())


def rows(quick: bool, repeats: int, ceilings: Ceilings, device: str = "cpu") -> Iterator[Row]:  # noqa: ARG001
    """Every network."""
    count = IMAGES[device]
    for name in CASES[device][: 1 if quick else None]:
        arch, width, _ = (NETWORKS | OTHERS)[name]
        torch.manual_seed(0)
        model = settled(ARCHITECTURES[arch](width, CLASSES)).requires_grad_(False)
        images = torch.rand(count, 3, 32, 32, device=device).contiguous(memory_format=LAST)
        pull = torch.randn(count, CLASSES, device=device)
        double = copy.deepcopy(model).to(device, torch.float64)
        expected = [one.float() for one in gradients(double, images.double(), pull.double())]
        for way, precision, network in ways_of(model, device):
            row = Row("masked_gradient", f"{name}, {count} images", way, precision, None, False)
            row = replace(row, target=TARGETS[device] if way == "onp" else None)
            run = partial(gradients, network, images, pull)
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
                for _ in range(REPLAYED_FROM if device == "cuda" and way == "onp" else 0):
                    run()
                tolerance = TOLERANCES[precision]
                often = 1 if precision == "reduced" and not BF16 else 10 * repeats
                yield timed(row, run, expected, often, tolerance, by_norm=True)
