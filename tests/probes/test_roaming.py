"""A roaming square lies where each image has it, in one piece, and is the same pattern in all."""

from __future__ import annotations

import pytest
import torch

from onp.probes.roaming import Roaming


@pytest.mark.parametrize(("levels", "divisor"), [(256, 255), (256, 1), (2, 1)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 13, 30)], ids=str)
def test_every_image_has_a_place_of_its_own(
    shape: tuple[int, int, int], levels: int, divisor: int
) -> None:
    family, random = Roaming(), torch.Generator().manual_seed(0)
    parameters = family.start(2, shape, random)
    tall, wide = parameters[0].shape[-2:]
    images = torch.randint(0, levels, (2, 40, *shape), generator=random) / divisor
    valid = (0.0, (levels - 1) / divisor)
    triggered = family.apply(parameters, images, valid)
    corners = set()
    for patterns, row, own in zip(parameters[0].sigmoid(), triggered, images, strict=True):
        for after, before in zip(row, own, strict=True):
            rows, columns = (after != before).any(0).nonzero().T
            top, left = int(rows.min()), int(columns.min())
            corners.add((top, left))
            patch = after[:, top : top + tall, left : left + wide]
            torch.testing.assert_close(patch, patterns[0] * valid[1])
            outside = torch.ones(shape[1:], dtype=torch.bool)
            outside[top : top + tall, left : left + wide] = False
            assert torch.equal(after[:, outside], before[:, outside])
    assert len(corners) > 50
    assert max(top for top, _ in corners) > shape[1] - tall - 3
    assert max(left for _, left in corners) > shape[2] - wide - 4
    again = family.apply(parameters, images[:, 7:9], valid)
    assert torch.equal(again, triggered[:, 7:9])
