"""What scores say, and what they refuse to say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from onp.data import ImageSet
from onp.errors import BadData, UsageError
from onp.metrics import interval, score

CLASSES = 3


class Brightness(nn.Module):
    """Answers 0, 1 or 2 by how bright the first channel is."""

    def forward(self, images: Tensor) -> Tensor:
        middles = torch.tensor([0.0, 0.5, 1.0])
        return -(images[:, 0].mean((1, 2))[:, None] - middles).abs()


def shades() -> ImageSet:
    """Four images of each class, one of class 2 mistaken for class 1."""
    labels = torch.arange(CLASSES).repeat_interleave(4)
    images = (labels * 127).view(-1, 1, 1, 1).expand(-1, 4, 4, 3).to(torch.uint8).clone()
    images[-1] = 127
    return ImageSet(images, labels)


def test_rates_are_of_the_images_that_can_tell() -> None:
    told = score(Brightness(), shades(), trigger=torch.ones_like, target=2)
    assert told["clean_accuracy"] == pytest.approx(11 / 12)
    assert told["triggered_images"] == 8  # those of the target's class say nothing
    assert (told["attack_success_rate"], told["robust_accuracy"]) == (1.0, 0.0)


@pytest.mark.parametrize("target", [CLASSES, -1, 99])
def test_a_target_that_the_network_does_not_have_is_no_repair(target: int) -> None:
    with pytest.raises(UsageError, match="none of the network's classes, 0 to 2"):
        score(Brightness(), shades(), trigger=torch.ones_like, target=target)


def test_labels_that_the_network_does_not_have_are_refused() -> None:
    clean = shades()
    with pytest.raises(BadData, match=r"labels must be in 0 \.\. 2"):
        score(Brightness(), replace(clean, labels=clean.labels + 1))


def test_of_no_images_there_is_no_rate() -> None:
    told = score(Brightness(), shades()[torch.arange(0)])
    assert (told["images"], told["clean_accuracy"]) == (0, None)


def test_an_interval_holds_its_share_and_knows_no_images() -> None:
    low, high = interval(9, 10)
    assert 0 < low < 0.9 < high < 1
    assert interval(0, 0) == (0.0, 1.0)
