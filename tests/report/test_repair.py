"""Parts of the report that few runs show."""

from __future__ import annotations

import json

import torch

from onp.probes.margin import Margins
from onp.report.repair import _margins, _squares
from onp.scene import PLACES, Squares


def test_a_class_without_images_has_no_natural_margin() -> None:
    margins = Margins([7, 2], torch.tensor([1.5, 8.25]), torch.tensor([torch.inf, 0.5]))
    rows = json.loads(json.dumps(_margins(margins), allow_nan=False))
    assert rows == [
        {"target": 2, "margin": 8.25, "natural": 0.5},
        {"target": 7, "margin": 1.5, "natural": None},
    ]


def test_the_square_without_a_place_lies_anywhere() -> None:
    successes = torch.zeros(len(PLACES), 2)
    successes[3, 0], successes[-1, 1] = 0.5, 0.75
    assert _squares(Squares([4, 9], successes)) == [
        {"target": 9, "place": "anywhere", "success": 0.75},
        {"target": 4, "place": 3, "success": 0.5},
    ]
