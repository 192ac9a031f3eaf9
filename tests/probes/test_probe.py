"""What a probe is after: one class, or the next label."""

from __future__ import annotations

import torch

from onp.probes.additive import Additive
from onp.probes.probe import (
    LabelShift,
    OneClass,
    Probe,
    Strengthened,
    Target,
    answers_of,
    classes_of,
)


def probe(target: Target) -> Probe:
    return Probe(Additive(), target, [torch.zeros(1, 1, 3, 4, 4)], (0.0, 1.0), 1.0)


def test_one_class_is_wanted_of_every_image() -> None:
    labels = torch.tensor([0, 3, 2])
    assert probe(3).wanted(labels).tolist() == [3, 3, 3]
    assert probe(3).name == "additive->3"
    assert classes_of(3) == [3]


def test_a_label_shift_wants_the_next_and_wraps_around() -> None:
    labels = torch.tensor([0, 3, 2])
    target = LabelShift(classes=4)
    assert probe(target).wanted(labels).tolist() == [1, 0, 3]
    assert probe(LabelShift(4, by=2)).wanted(labels).tolist() == [2, 1, 0]
    assert probe(target).name == "additive->label+1"
    assert classes_of(target) == [0, 1, 2, 3]


def test_strengths_take_turns_and_stay_in_range() -> None:
    added = torch.full((1, 1, 3, 4, 4), 0.2)
    one = Probe(Additive(), 3, [added], (0.0, 1.0), 1.0)
    images = torch.tensor([0.1, 0.1, 0.1, 0.75])[:, None, None, None].expand(4, 3, 4, 4)
    both = Strengthened(one, (1.0, 1.5))
    found = both(images)
    assert found.shape == images.shape
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([0.3, 0.4, 0.3, 1.0]))
    torch.testing.assert_close(Strengthened(one, (1.0,))(images), one(images))
    assert both(images[:0]).shape == (0, 3, 4, 4)
    assert both.wanted(torch.tensor([0, 1])).tolist() == [3, 3]


def test_a_trigger_for_one_class_leaves_the_others() -> None:
    target = OneClass(source=3, target=1)
    labels = torch.tensor([0, 3, 1, 3])
    assert answers_of(target, labels).tolist() == [0, 1, 1, 1]
    assert classes_of(target) == [1]
    assert str(target) == "3->1"
