"""Attention at odd sizes: fewer tokens than a vector has lanes, heads that fill no block."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp import masks
from onp.ops.masked_forward import instruction_sets, lower
from onp.suspect.trace import trace

ISAS = instruction_sets()


class Attending(nn.Module):
    """Every pixel a token; the first ``asked`` of them ask all of them."""

    def __init__(self, heads: int, size: int, asked: int) -> None:
        super().__init__()
        self.heads, self.asked = heads, asked
        self.qkv = nn.Conv2d(3, 3 * heads * size, 1)
        self.head = nn.Linear(heads * size, 5)

    def forward(self, x: Tensor) -> Tensor:
        t = self.qkv(x).flatten(2).transpose(1, 2)  # [N, T, 3 * heads * size]
        n, tokens, _ = t.shape
        q, k, v = t.reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(out[:, : self.asked].mean(1))


def in_double(net: Attending, pruned: Tensor, images: Tensor) -> Tensor:
    """Logits float64 [B, N, K], softmax written out; masks prune the values' channels."""
    qkv, head = net.qkv, net.head
    t = torch.einsum("nchw,oc->nhwo", images.double(), qkv.weight.double().flatten(1))
    assert qkv.bias is not None
    t = (t + qkv.bias.double()).flatten(1, 2).unflatten(2, (3, net.heads, -1))
    q, k, v = t.unbind(2)  # [N, T, heads, size]
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    out = torch.einsum("nhqk,nkhd->nqhd", weights, v)[:, : net.asked].mean(1).flatten(1)
    kept = out * (~pruned[:, None]).double()
    return kept @ head.weight.double().T + head.bias.double()


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 3), (1, 4), (3, 3), (1, 17), (5, 13), (3, 11)]
)
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 5), (2, 16), (1, 20), (2, 33)])
def test_odd_sizes(height: int, width: int, heads: int, size: int) -> None:
    torch.manual_seed(heads * size + width)
    asked = 1 if width == 17 else height * width
    net = Attending(heads, size, asked).eval()
    nn.init.normal_(net.qkv.weight)  # scores far from alike
    images = torch.randn(3, 3, height, width)
    traced = trace(net, (3, height, width))
    assert traced.sites == heads * size
    pruned = torch.rand(4, traced.sites) < 0.3
    expected = in_double(net, pruned, images).float()
    for isa in ISAS:
        got = lower(traced, net).run(masks.pack(pruned), images, isa=isa)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_in_its_image(isa: str) -> None:
    torch.manual_seed(0)
    net = Attending(2, 5, 9).eval()
    images = torch.randn(3, 3, 3, 3)
    images[1, 0, 2, 2] = torch.nan
    traced = trace(net, (3, 3, 3))
    nothing = torch.zeros(1, traced.sites, dtype=torch.bool)
    got = lower(traced, net).run(masks.pack(nothing), images, isa=isa)[0]
    assert bool(got[1].isnan().all())
    torch.testing.assert_close(got[[0, 2]], net(images[[0, 2]]).detach(), rtol=1e-4, atol=1e-5)


def test_scores_beyond_what_exp_holds() -> None:
    torch.manual_seed(0)
    net = Attending(1, 4, 20).eval()
    nn.init.normal_(net.qkv.weight, std=30)
    images = torch.randn(2, 3, 4, 5)
    traced = trace(net, (3, 4, 5))
    nothing = torch.zeros(1, traced.sites, dtype=torch.bool)
    expected = in_double(net, nothing, images).float()
    for isa in ISAS:
        got = lower(traced, net).run(masks.pack(nothing), images, isa=isa)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
