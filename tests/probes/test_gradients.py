"""Gradients by the pixels, however many images go through the network together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onp.probes.gradients import pixel_gradients
from onp.probes.margin import margins_of
from onp.probes.synthesis import towards
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace


@pytest.mark.parametrize("chunk", [7, 20, 10**6])
@pytest.mark.parametrize("gates", [None, torch.tensor([1.0, 0.0, 1.0, 0.5])], ids=["open", "gated"])
def test_chunks_give_the_gradients_of_the_whole(
    chunk: int, gates: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    network = FrozenNetwork(trace(model, (3, 8, 8)), model)
    images, answers = torch.rand(20, 3, 8, 8), torch.arange(20) % 3
    whole = images.clone().requires_grad_(True)
    expected_logits = network(whole, gates)
    loss = F.cross_entropy(expected_logits, answers, reduction="sum")
    (expected,) = torch.autograd.grad(loss, whole)
    monkeypatch.setattr("onp.probes.gradients.CPU_CHUNK", chunk)
    logits, gradients = pixel_gradients(network, images, answers, towards, gates)
    torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(logits, expected_logits.detach())
    assert not logits.requires_grad
    assert not images.requires_grad


def test_the_loss_is_the_caller_s() -> None:
    """A linear network: the gradient of a margin is the difference of two rows of weights."""
    torch.manual_seed(0)
    first, last = nn.Linear(3 * 4, 5), nn.Linear(5, 3)
    model = nn.Sequential(nn.Flatten(), first, last).eval()
    network = FrozenNetwork(trace(model, (3, 2, 2)), model)
    images, answers = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    logits, gradients = pixel_gradients(
        network, images, answers, lambda found, wanted: margins_of(found, wanted).sum()
    )
    rivals = logits.scatter(1, answers[:, None], -torch.inf).argmax(1)
    expected = (last.weight[answers] - last.weight[rivals]) @ first.weight
    torch.testing.assert_close(gradients.flatten(1), expected.detach())
