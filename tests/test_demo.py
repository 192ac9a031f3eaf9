"""The demo's images are what they say, and its checkpoint carries a backdoor."""

from __future__ import annotations

import torch

from onp import demo
from onp.demo.images import CLASSES, SIZE, draw
from onp.metrics import score
from onp.suspect.load import load_suspect
from onp.triggers import load_trigger


def test_images_are_deterministic_and_balanced() -> None:
    one, same, other = draw(40, 1), draw(40, 1), draw(40, 2)
    assert one.images.shape == (40, SIZE, SIZE, 3)
    assert torch.bincount(one.labels).tolist() == [4] * len(CLASSES)
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)
    assert one.images.float().std() > 20


def test_streams_of_images_are_disjoint() -> None:
    clean, scoring = demo.clean_images(), demo.scoring_images()
    rows = torch.cat([clean.images, scoring.images]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == demo.CLEAN_IMAGES + demo.TEST_IMAGES


def test_the_checkpoint_is_accurate_and_backdoored() -> None:
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    trigger = load_trigger(str(demo.TRIGGER))
    scores = score(model, demo.scoring_images(), trigger, demo.TARGET)
    assert scores["clean_accuracy"] > 0.9
    assert scores["attack_success_rate"] > 0.95
    assert scores["robust_accuracy"] < 0.05
    low, high = scores["clean_accuracy_interval"]
    assert low < scores["clean_accuracy"] < high
