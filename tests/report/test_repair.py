"""Parts of the report that few runs show."""

from __future__ import annotations

import json

import torch

from onp.probes.margin import Margins
from onp.report.repair import _margins


def test_a_class_without_images_has_no_natural_margin() -> None:
    margins = Margins([7, 2], torch.tensor([1.5, 8.25]), torch.tensor([torch.inf, 0.5]))
    rows = json.loads(json.dumps(_margins(margins), allow_nan=False))
    assert rows == [
        {"target": 2, "margin": 8.25, "natural": 0.5},
        {"target": 7, "margin": 1.5, "natural": None},
    ]
