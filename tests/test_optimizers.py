"""The optimisers step as torch's classes do, and leave torch's compiler alone."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor

from onp.optimizers import Adam, Sgd


def parameters() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).requires_grad_() for shape in ((3, 5), (4,), ())]


def gradients(values: list[Tensor], step: int) -> None:
    """Of a curved function; the last has none in the first step."""
    used = values[:-1] if step == 0 else values
    sum(value.square().square().sum() + step * value.sum() for value in used).backward()  # type: ignore[union-attr]


def test_adam_is_torchs() -> None:
    own, theirs = parameters(), parameters()
    adam = Adam((own[:1], 0.1), (own[1:], 0.02), betas=(0.5, 0.9))
    reference = torch.optim.Adam(
        [{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:], "lr": 0.02}], betas=(0.5, 0.9)
    )
    for step in range(6):
        if step == 3:
            adam.rates = [0.5 * rate for rate in adam.rates]
            for group in reference.param_groups:
                group["lr"] *= 0.5
        adam.zero_grad()
        reference.zero_grad()
        gradients(own, step)
        gradients(theirs, step)
        adam.step()
        reference.step()
        for one, other in zip(own, theirs, strict=True):
            assert torch.equal(one, other)


def test_sgd_is_torchs() -> None:
    own, theirs = parameters(), parameters()
    sgd = Sgd(own, 0.01, 0.9)
    reference = torch.optim.SGD(theirs, lr=0.01, momentum=0.9)
    for step in range(5):
        sgd.zero_grad()
        reference.zero_grad()
        gradients(own, step)
        gradients(theirs, step)
        sgd.step()
        reference.step()
        for one, other in zip(own, theirs, strict=True):
            assert torch.equal(one, other)


def test_a_repair_leaves_torchs_compiler_alone() -> None:
    code = """
import sys
import onp
from onp import demo
from onp.suspect.load import load_suspect

suspect = load_suspect(demo.CHECKPOINT, demo.ARCH).model
assert onp.sanitize(suspect, demo.clean_images(), budget="quick").verdict == "backdoor"
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
