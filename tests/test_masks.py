"""The mask format: packing, its inverse, and the layout that the native side reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onp import masks


@given(batch=st.integers(0, 5), sites=st.integers(0, 200), seed=st.integers(0, 999))
def test_unpacking_inverts_packing(batch: int, sites: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    pruned = torch.rand(batch, sites, generator=random) < 0.5
    packed = masks.pack(pruned)
    assert packed.shape == (batch, masks.words(sites))
    assert packed.dtype == torch.int64
    assert torch.equal(masks.unpack(packed, sites), pruned)


@pytest.mark.parametrize("site", [0, 1, 62, 63, 64, 127, 129])
def test_a_site_is_bit_s_mod_64_of_word_s_div_64(site: int) -> None:
    pruned = torch.zeros(1, 130, dtype=torch.bool)
    pruned[0, site] = True
    words = [word & (2**64 - 1) for word in masks.pack(pruned)[0].tolist()]
    assert words == [1 << (site % 64) if word == site // 64 else 0 for word in range(3)]


def test_wrong_shapes_and_types_are_named() -> None:
    with pytest.raises(ValueError, match="must be bool"):
        masks.pack(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"int64 \[B, 2\] for 65 sites"):
        masks.unpack(torch.zeros(1, 1, dtype=torch.int64), 65)
