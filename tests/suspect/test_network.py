"""The frozen network's own decisions; what it computes is tested with the operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onp.suspect import network as module
from onp.suspect.network import FrozenNetwork
from onp.suspect.trace import trace
from tests.networks import network


def test_a_capture_without_room_lets_all_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second try then finds what they held."""
    model = network("resnet20", size=(8, 8))
    frozen = FrozenNetwork(trace(model, (3, 8, 8)), model)
    emptied: list[bool] = []

    class Captured:
        def __init__(self, function: object, inputs: tuple[Tensor | None, ...]) -> None:
            if not emptied:
                raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "Replayed", Captured)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    frozen._graphs["another"] = object()  # type: ignore[assignment]
    inputs = (torch.rand(1, 3, 8, 8), None)
    assert frozen._captured(frozen._logits, inputs) is None
    assert not frozen._graphs
    assert emptied == [True]
    assert isinstance(frozen._captured(frozen._logits, inputs), Captured)
