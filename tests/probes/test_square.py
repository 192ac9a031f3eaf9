"""Squares tile the image and change their own place alone."""

from __future__ import annotations

import pytest
import torch

from onp.probes.square import SIDES, SQUARES


@pytest.mark.parametrize("size", [(32, 32), (33, 18), (4, 7)], ids=str)
@pytest.mark.parametrize("valid", [(0.0, 1.0), (-1.0, 1.0)], ids=str)
def test_squares_tile_the_image(size: tuple[int, int], valid: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.full((2, 3, 3, *size), 7.0)  # far outside the range: what stays is seen
    changed = torch.zeros(size)
    for square in SQUARES:
        parameters = square.start(2, (3, *size), generator)
        triggered = square.apply(parameters, images, valid)
        assert triggered.shape == images.shape
        here = (triggered != images).any(2).all(1).all(0)
        assert torch.equal(here, (triggered != images).any(2).any(1).any(0))
        patch = triggered[..., here]
        assert float(patch.min()) >= valid[0]
        assert float(patch.max()) <= valid[1]
        changed += here
        assert square.size(parameters, valid).tolist() == [1.0, 1.0]
        assert square.penalty(parameters).tolist() == [0.0, 0.0]
    assert bool((changed == 1).all())
    assert len(SQUARES) == SIDES**2


def test_two_triggers_of_a_place_are_two_patterns() -> None:
    square = SQUARES[5]
    parameters = square.start(2, (3, 16, 16), torch.Generator().manual_seed(0))
    first, second = square.apply(
        parameters, torch.rand(1, 4, 3, 16, 16).expand(2, -1, -1, -1, -1), (0, 1)
    )
    assert torch.equal(first[0, :, 4:8, 4:8], first[3, :, 4:8, 4:8])
    assert not torch.equal(first[0, :, 4:8, 4:8], second[0, :, 4:8, 4:8])
