"""Steps of unlearning: ours against a plain loop in torch, eager and compiled.

All take the same steps of the same batches. What the first step changes is compared with the same
in fp64 before several are timed: ascent by batch statistics amplifies rounding, so that after four
steps torch with channels last is as far from torch without as ours is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels.gate import timed
from bench.kernels.masked_forward import FIRST, LAST, NETWORKS, settled
from bench.kernels.peak import Ceilings, best_time
from bench.kernels.rows import Row
from bench.zoo.architectures import ARCHITECTURES
from onp.config import UnlearningConfig
from onp.ledger import Ledger
from onp.probes.unlearning import unlearn

KERNEL = "unlearning"
CASES = ("preactresnet18-16", "resnet20-16")
IMAGES, CLASSES, STEPS = 256, 10, 4
CONFIG = UnlearningConfig(stop_accuracy=-1.0)
"""Never done before its last step."""
TOLERANCE = 1e-2
"""Of the norm of what one step changes: torch's batch norms with channels last come to .008."""

Network = Callable[[Tensor], Tensor]
Steps = Callable[[int], list[Tensor]]
"""So many steps, and what they change each weight by."""


def ours(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[Tensor]:
    """What so many steps of unlearning change each weight by."""
    config = replace(CONFIG, max_steps=steps)
    student = unlearn(model, images, labels, config, seed=0, ledger=Ledger()).model
    return changes(model, student)


def plain(
    model: nn.Module, images: Tensor, labels: Tensor, layout: torch.memory_format, *, compiled: bool
) -> Steps:
    """The same by a loop of torch's own parts; compiled once."""
    student = copy.deepcopy(model).requires_grad_(True).to(memory_format=layout)
    call: Network = torch.compile(student) if compiled else student

    def run(steps: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        student.load_state_dict(model.state_dict())
        student.train()
        optimizer = torch.optim.SGD(
            student.parameters(), CONFIG.learning_rate, momentum=CONFIG.momentum
        )
        for _ in range(steps):
            index = torch.randperm(len(images), generator=random)[: CONFIG.batch]
            optimizer.zero_grad()
            logits = call(images[index].contiguous(memory_format=layout))
            (-F.cross_entropy(logits, labels[index])).backward()
            nn.utils.clip_grad_norm_(student.parameters(), CONFIG.gradient_norm)
            optimizer.step()
        with torch.no_grad():  # as ours counts its answers
            student.eval()(images)
        return changes(model, student)

    return run


def changes(before: nn.Module, after: nn.Module) -> list[Tensor]:
    """All weights' changes as one vector."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return [torch.cat([(b - a).detach().flatten() for a, b in pairs])]


def rows(quick: bool, repeats: int, ceilings: Ceilings) -> Iterator[Row]:  # noqa: ARG001
    """Every network."""
    for name in CASES[: 1 if quick else None]:
        arch, width, _ = NETWORKS[name]
        torch.manual_seed(0)
        model = settled(ARCHITECTURES[arch](width, CLASSES))
        data = torch.rand(IMAGES, 3, 32, 32), torch.randint(CLASSES, (IMAGES,))
        ways: dict[str, Steps] = {
            "onp": partial(ours, model, *data),
            "torch eager, NCHW": plain(model, *data, FIRST, compiled=False),
            "torch eager, channels last": plain(model, *data, LAST, compiled=False),
            "torch.compile": plain(model, *data, LAST, compiled=True),
        }
        exact = copy.deepcopy(model).double(), data[0].double(), data[1]
        expected = plain(*exact, FIRST, compiled=False)(1)
        for way, run in ways.items():
            case = f"{name}, {STEPS} steps of {CONFIG.batch} images"
            row = Row(KERNEL, case, way, "fp32", None, False)
            row = replace(row, target=1.2 if way == "onp" else None)
            row = timed(row, partial(run, 1), expected, 1, TOLERANCE, by_norm=True)
            if row.correct:
                row = replace(row, seconds=best_time(partial(run, STEPS), repeats))
            yield row
