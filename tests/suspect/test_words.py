"""The many words that people write networks in: functions for modules, products, moved channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onp.errors import UntraceableModel
from onp.suspect.network import FrozenNetwork
from onp.suspect.surgery import apply_mask, remove_mask
from onp.suspect.trace import Trace, trace
from tests.networks import hooked_logits

Middle = Callable[["_Network", Tensor], Tensor]


class _Network(nn.Module):
    """A convolution to [N, 8, 6, 6], what the test says, one of ``width`` channels to 5 logits."""

    def __init__(self, middle: Middle, width: int = 8) -> None:
        super().__init__()
        self.middle = middle
        self.stem, self.next = nn.Conv2d(3, 8, 3), nn.Conv2d(width, 6, 1)
        self.inner = nn.Conv2d(8, 8, 3, 2, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.linear, self.mixed = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.groups = nn.GroupNorm(4, 8, eps=1e-3)
        self.plain = nn.Sequential(nn.ZeroPad2d(1), nn.InstanceNorm2d(8), nn.AvgPool2d(3, 1))
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.head = nn.Linear(6, 5)
        for tensor in (self.norm.running_mean, self.norm.bias):
            assert tensor is not None
            nn.init.uniform_(tensor, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.next(self.middle(self, self.stem(x)))
        return self.head(torch.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def traced(middle: Middle, width: int = 8) -> tuple[_Network, Trace]:
    torch.manual_seed(0)
    model = _Network(middle, width).eval()
    return model, trace(model, (3, 8, 8))


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (6, 6))


def _functional_norm(net: _Network, x: Tensor) -> Tensor:
    norm = net.norm
    return F.relu(
        F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, 1e-5)
    )


def _functional_convolution(net: _Network, x: Tensor) -> Tensor:
    inner = F.conv2d(F.pad(x, (1, 1, 1, 1)), net.inner.weight, net.inner.bias, 2, groups=4)
    return F.relu(inner)


def _another_stride(net: _Network, x: Tensor) -> Tensor:
    return F.conv2d(x, net.inner.weight, net.inner.bias, groups=4)


def _functional_linear(net: _Network, x: Tensor) -> Tensor:
    pixels = F.linear(x.movedim(1, -1), net.linear.weight, bias=net.linear.bias)
    return F.hardswish(pixels).movedim(-1, 1)


def _squeezed(net: _Network, x: Tensor) -> Tensor:
    scale = F.hardsigmoid(net.linear(x.mean((2, 3))))
    return scale[:, :, None, None] * x


def _expanded(net: _Network, x: Tensor) -> Tensor:
    images, channels, _, _ = x.size()
    scale = torch.sigmoid(net.linear(F.adaptive_avg_pool2d(x, 1).view(images, channels)))
    return x * scale.view(images, channels, 1, 1).expand_as(x)


def _swish_by_hand(_: _Network, x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def _shuffled(_: _Network, x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


def _parts(_: _Network, x: Tensor) -> Tensor:
    first, *rest = torch.split(x, [2, 3, 3], dim=1)
    return torch.cat([*rest, F.relu(first), x[:, [7, 0]]], dim=1)


def _repeated(_: _Network, x: Tensor) -> Tensor:
    return torch.cat([x[:, :4].repeat(1, 2, 1, 1)[:, 1:], x[:, 5:6]], 1)


def _enlarged(_: _Network, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(x, (2, 1)), (4, 3))


def _rounded_up(_: _Network, x: Tensor) -> Tensor:
    pooled = F.max_pool2d(x, 3, 2, ceil_mode=True)
    return F.avg_pool2d(pooled, 2, 2, padding=1, ceil_mode=True, count_include_pad=True)


def _grouped(net: _Network, x: Tensor) -> Tensor:
    own = net.groups
    x = F.group_norm(x, 4, own.weight, own.bias, own.eps)
    return F.relu(x - net.plain(x))


def _padded(_: _Network, x: Tensor) -> Tensor:
    return F.pad(F.pad(x, (1, 2)), (-1, 0, 0, 3))


def _leaky(net: _Network, x: Tensor) -> Tensor:
    return net.act(net.norm(x)).clamp(-0.4, 0.6) + F.elu(x, 0.5)


def _multihead(net: _Network, x: Tensor) -> Tensor:
    tokens = _tokens(x)
    return _map(tokens + net.attention(tokens, tokens, tokens)[0])


def _unused_weights(net: _Network, x: Tensor) -> Tensor:
    out, _weights = net.attention(_tokens(x), _tokens(x), _tokens(x))
    return _map(out)


def _spelled_out(net: _Network, x: Tensor) -> Tensor:
    tokens = _tokens(x)
    q, k = (layer(tokens).unflatten(2, (2, 4)).transpose(1, 2) for layer in (net.linear, net.mixed))
    scores = torch.matmul(q * 0.5, k.mT) / 1.5
    weights = F.dropout(scores.softmax(dim=-1), training=net.training)
    return _map((weights @ q).transpose(1, 2).flatten(2))


UNDERSTOOD: dict[str, tuple[Middle, int]] = {
    "functional norm": (_functional_norm, 8),
    "functional convolution": (_functional_convolution, 8),
    "functional linear layer": (_functional_linear, 8),
    "squeezed": (_squeezed, 8),
    "squeezed, expanded": (_expanded, 8),
    "swish by hand": (_swish_by_hand, 8),
    "shuffled channels": (_shuffled, 8),
    "parts of the channels": (_parts, 10),
    "repeated channels": (_repeated, 8),
    "enlarged by pooling": (_enlarged, 8),
    "pools that round up": (_rounded_up, 8),
    "functions of each number": (_leaky, 8),
    "group norms": (_grouped, 8),
    "zeros around a map": (_padded, 8),
    "nn.MultiheadAttention": (_multihead, 8),
    "its weights unused": (_unused_weights, 8),
    "attention spelled out": (_spelled_out, 8),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_it_is_understood(case: str) -> None:
    """As the module computes it, masked in every form."""
    model, found = traced(*UNDERSTOOD[case])
    images = torch.rand(3, 3, 8, 8)
    pruned = torch.rand(found.sites, generator=torch.Generator().manual_seed(1)) < 0.5
    hooked = case not in ("functional linear layer", "functional convolution")  # which call none
    with torch.no_grad():
        plain = model(images)
        expected = FrozenNetwork(found, model, native=False)(images, (~pruned).float())
        if hooked:
            expected = hooked_logits(model, found, pruned, images)
        for native in (False, True):
            frozen = FrozenNetwork(found, model, native=native)
            torch.testing.assert_close(frozen(images), plain, rtol=1e-4, atol=1e-5)
            got = frozen(images, (~pruned).float())
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for repaired in (apply_mask(model, found, pruned), remove_mask(model, found, pruned)[0]):
            torch.testing.assert_close(repaired(images), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    leaf = images.requires_grad_(True)
    pull = torch.randn(3, 5)
    wanted, got = (
        torch.autograd.grad(one(leaf), leaf, pull)[0]
        for one in (model, FrozenNetwork(found, model))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_number_for_a_channel_makes_none_of_it() -> None:
    """The channels of a squeezed map come from the map, and are cut together with their gate."""
    model, found = traced(_squeezed)
    product = next(i for i, op in enumerate(found.ops) if op.kind == "product")
    layer = next(one for one in found.layers if one.value == product)
    assert [found.ops[p].module for p in layer.producers] == ["stem"]
    channels = [found.channels.of_value[v] for v in (product, *found.ops[product].inputs)]
    assert torch.equal(channels[0], channels[1])
    assert torch.equal(channels[0], channels[2])
    of_channel = found.group_of_site == found.group_of_site[layer.start + 3]
    assert int(of_channel.sum()) == 2  # as the gate reads it and as the convolution does
    smaller, stayed = remove_mask(model, found, of_channel)
    assert stayed == 0
    assert smaller.get_submodule("linear").weight.shape == (7, 7)  # type: ignore[union-attr]
    assert smaller.get_submodule("next").weight.shape == (6, 7, 1, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(("activation", "owned"), [(F.hardswish, True), (torch.sigmoid, False)])
def test_a_norm_is_zeroed_only_where_zeros_stay(
    activation: Callable[[Tensor], Tensor], owned: bool
) -> None:
    """The sigmoid of 0 is a half."""
    model, found = traced(lambda net, x: activation(net.norm(x)))
    layer = next(one for one in found.layers if one.name == "norm")
    assert (layer.norm is not None) == owned
    pruned = torch.zeros(found.sites, dtype=torch.bool)
    pruned[layer.start + 2] = True
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            apply_mask(model, found, pruned)(images), hooked_logits(model, found, pruned, images)
        )


def _attends(*positions: Tensor | None, **options: object) -> Middle:
    def middle(net: _Network, x: Tensor) -> Tensor:
        tokens = _tokens(x)
        return _map(net.attention(tokens, tokens, tokens, *positions, **options)[0])

    return middle


def _attends_to_another(net: _Network, x: Tensor) -> Tensor:
    tokens = _tokens(x)
    return _map(net.attention(tokens, net.linear(tokens), tokens)[0])


def _reads_its_weights(net: _Network, x: Tensor) -> Tensor:
    tokens = _tokens(x)
    return x * net.attention(tokens, tokens, tokens)[1].mean((1, 2))[:, None, None, None]


def _norm_of_the_images(net: _Network, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, net.norm.weight, net.norm.bias, True)


def _norm_of_the_batch(net: _Network, x: Tensor) -> Tensor:
    norm = net.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True)


def _turned_weights(net: _Network, x: Tensor) -> Tensor:
    return F.linear(x.movedim(1, -1), net.linear.weight.T, net.linear.bias).movedim(-1, 1)


def _written_as_a_statement(net: _Network, x: Tensor) -> Tensor:
    y = net.norm(x)
    F.relu_(y)
    return y


def _added_to_another_name(net: _Network, x: Tensor) -> Tensor:
    y = z = net.norm(x)
    y += 1.0
    return y * z


def _written_in_part(net: _Network, x: Tensor) -> Tensor:
    y = net.norm(x)
    y[:, :4].relu_()
    return y


def _norm_of_two(net: _Network, x: Tensor) -> Tensor:
    return F.batch_norm(x, net.norm.running_mean, net.norm.running_var, net.linear.bias, None)


def _another_epsilon(net: _Network, x: Tensor) -> Tensor:
    norm = net.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)


REFUSED: dict[str, tuple[Middle, str]] = {
    "reflected padding": (lambda _, x: F.pad(x, (1, 1, 1, 1), "reflect"), "padding with zeros"),
    "padded channels": (
        lambda _, x: F.pad(x, (0, 0, 0, 0, 0, 2))[:, :8],
        "only the rows and columns",
    ),
    "attention with a mask": (_attends(None, False, torch.zeros(36, 36)), "without masks"),
    "attention between two values": (_attends_to_another, "of one value with itself"),
    "attention's weights": (_reads_its_weights, "reads getitem.*, which is no image value"),
    "norm of the images": (_norm_of_the_images, "must take the tensors of one module"),
    "norm of the batch": (_norm_of_the_batch, "statistics from the module"),
    "turned weights": (_turned_weights, "of one module as they are"),
    "written as a statement": (_written_as_a_statement, "reads norm, which was written into"),
    "written under another name": (_added_to_another_name, "reads norm, which was written into"),
    "written in part": (_written_in_part, "reads norm, which was written into"),
    "a pixel's value": (lambda _, x: x * x[0, 0, 0, 0].item(), r"depend on the image.*item\(\)"),
    "a branch on values": (
        lambda _, x: x * 2 if torch.allclose(x, F.relu(x)) else x,
        r"depend on the image.*allclose\(\)",
    ),
    "indices of a pool": (
        lambda _, x: F.max_pool2d(x, 2, return_indices=True)[0],
        "max_pool2d_with_indices",
    ),
    "pool of tokens": (
        lambda _, x: F.avg_pool2d(x.flatten(2), (2, 1)).repeat(1, 2, 1).unflatten(2, (6, 6)),
        "must read a map",
    ),
    "a part of a maximum": (lambda _, x: x.max(dim=2, keepdim=True).values, "max"),
    "norm of two modules": (_norm_of_two, "must take the tensors of one module"),
    "convolution with another stride": (_another_stride, r"the stride of inner, \(2, 2\), got 1"),
    "norm with another epsilon": (_another_epsilon, "must have the epsilon of norm"),
    "function of two values": (lambda _, x: torch.clamp(x, max=F.relu(x)), "several values"),
    "product by position": (lambda _, x: x * x.mean(1, keepdim=True), "mean over all positions"),
    "enlarged unevenly": (lambda _, x: F.adaptive_avg_pool2d(x, 7), "from .* is not handled"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str) -> None:
    middle, message = REFUSED[case]
    with pytest.raises(UntraceableModel, match=message):
        traced(middle)


def test_attention_must_have_its_images_first() -> None:
    torch.manual_seed(0)
    model = _Network(_multihead).eval()
    model.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(UntraceableModel, match="batch_first=True"):
        trace(model, (3, 8, 8))


def test_attention_must_not_add_keys() -> None:
    torch.manual_seed(0)
    model = _Network(_multihead).eval()
    model.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
    with pytest.raises(UntraceableModel, match="added keys"):
        trace(model, (3, 8, 8))
