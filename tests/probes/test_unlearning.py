"""Unlearning leaves the class that a backdoor answers, and leaves the given network alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onp import demo
from onp.config import UnlearningConfig
from onp.ledger import Ledger
from onp.probes.unlearning import unlearn
from onp.suspect.architectures.preactresnet import of_width
from onp.suspect.load import load_suspect


def test_the_backdoors_target_is_what_is_left() -> None:
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clean = demo.clean_images()
    ledger = Ledger()
    unlearned = unlearn(
        model, clean.floats(), clean.labels, UnlearningConfig(), seed=0, ledger=ledger
    )
    assert unlearned.suspects(1) == [demo.TARGET]
    assert int(unlearned.answers[demo.TARGET]) > len(clean) / 2
    assert int(unlearned.answers.sum()) == len(clean)
    assert ledger.total <= 3 * UnlearningConfig.batch * UnlearningConfig.max_steps + len(clean)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not model.training


@pytest.mark.parametrize("width", [2, 5, 7, 8, 12])
def test_narrow_networks_are_unlearned_too(width: int) -> None:
    """Channels-last weight gradients of narrow layers abort torch: see training_layout."""
    torch.manual_seed(0)
    images, labels = torch.rand(17, 3, 32, 32), torch.arange(17) % 4
    config = UnlearningConfig(max_steps=2, stop_accuracy=-1.0)
    ledger = Ledger()
    unlearned = unlearn(of_width(width, 4), images, labels, config, seed=0, ledger=ledger)
    assert ledger.total == 2 * 3 * 17 + 17
    assert int(unlearned.answers.sum()) == 17


def test_without_batch_norms_it_goes_gently() -> None:
    """A layer that normalises nothing across images holds nothing either."""
    torch.manual_seed(0)
    images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 4
    config = UnlearningConfig(max_steps=3, gentle_steps=2, stop_accuracy=-1.0)
    for norm, held in (
        (nn.Identity(), False),
        (nn.GroupNorm(2, 4), False),
        (nn.BatchNorm2d(4), True),
    ):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(144, 4)).eval()
        ledger = Ledger()
        unlearned = unlearn(model, images, labels, config, seed=0, ledger=ledger)
        assert ledger.total == (3 if held else 2) * 3 * 40 + 40
        moved = torch.cat(
            [
                (after - before).detach().flatten()
                for before, after in zip(
                    model.parameters(), unlearned.model.parameters(), strict=True
                )
            ]
        )
        if not held:  # two steps of at most .003, and of 1.9 times that with momentum
            assert 0 < float(moved.norm()) <= 0.003 * 2.9 + 1e-5
