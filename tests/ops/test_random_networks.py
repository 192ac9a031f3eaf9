"""Five hundred random small networks: engine, its gradients, and torch's executor against hooks;
the GPU plan on a few of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from onp import masks
from onp.errors import UnsupportedOperation
from onp.ops import masked_forward, masked_forward_gpu, masked_gradient
from onp.suspect.network import FrozenNetwork
from onp.suspect.surgery import apply_mask, remove_mask
from onp.suspect.trace import Trace, trace
from tests.networks import hooked_logits

NETWORKS, PART = 500, 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class RandomNetwork(nn.Module):
    """Convolutions of every kind, norms, activations, residual sums, concatenations, pools, MLPs
    with layer norms, attention, products and shuffled channels, in a random order; one or two
    linear layers at the end."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.size = self.side = self.random.choice((7, 8, 12))
        self.channels = 3
        self.kinds: list[str] = []
        self.parts = nn.ModuleList()
        self._add("conv")
        for _ in range(self.random.randint(0, 5)):
            self._add(self.random.choice(list(BLOCKS)))
        self.flat = self.side <= 4 and self.random.random() < 0.3
        width = self.channels * (self.side**2 if self.flat else 1)
        hidden = self.random.choice((None, 5, 9))
        self.hidden = None if hidden is None else nn.Linear(width, hidden)
        self.head = nn.Linear(hidden or width, 4)
        del self.random

    def _add(self, kind: str) -> None:
        self.kinds.append(kind)
        self.parts.append(BLOCKS[kind](self))

    def conv(self, outputs: int, *, strided: bool = True, depthwise: bool = False) -> nn.Sequential:
        """A convolution, with or without a norm and an activation; keeps track of the sizes."""
        kernel = self.random.choice((1, 3, 3, 5))
        stride = self.random.choice((1, 2)) if strided and self.side > 3 else 1
        shared = [g for g in (1, 2, 3) if self.channels % g == 0 and outputs % g == 0]
        groups = self.channels if depthwise else self.random.choice(shared)
        conv = nn.Conv2d(
            self.channels, outputs, kernel, stride, kernel // 2, groups=groups,
            bias=self.random.random() < 0.5,
        )  # fmt: skip
        layers: list[nn.Module] = [conv]
        if self.random.random() < 0.7:
            layers.append(norm(outputs))
        activation = self.random.choice((nn.ReLU, nn.ReLU, nn.ReLU6, None, SMOOTH))
        if activation is SMOOTH:
            activation = self.random.choice(SMOOTH)
        if activation is not None:
            layers.append(activation())
        self.side = (self.side - 1) // stride + 1
        self.channels = outputs
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for kind, part in zip(self.kinds, self.parts, strict=True):
            if kind in ("residual", "preact"):
                x = x + part(x)
            elif kind == "concat":
                x = torch.cat([x, part(x)], 1)
            else:
                x = part(x)
        x = x.flatten(1) if self.flat else x.mean((2, 3))
        if self.hidden is not None:
            x = torch.relu(self.hidden(x))
        return self.head(x)


SMOOTH = (nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid)


class MLP(nn.Module):
    """Of every pixel, behind a layer norm, with a residual sum."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = activation
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        nn.init.uniform_(self.norm.bias, -0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x.permute(0, 2, 3, 1))
        pixels = self.scale * self.down(self.activation(self.up(pixels)))
        return x + pixels.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Between the pixels and a token of its own, with an embedding and a residual sum; as torch's
    function or module, or spelled out."""

    def __init__(self, width: int, heads: int, side: int, how: str) -> None:
        super().__init__()
        self.heads, self.how = heads, how
        self.whole = nn.MultiheadAttention(width, heads, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, side * side + 1, width))
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, width, height, _ = x.shape
        tokens = torch.cat([self.token.expand(images, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self.places
        if self.how == "module":
            out, _ = self.whole(tokens, tokens, tokens, need_weights=False)
            tokens = tokens + out
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, height))
        parts = self.read(tokens).unflatten(2, (3, self.heads, width // self.heads))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if self.how == "function":
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = (0.5 * q) @ k.transpose(-2, -1) / 0.7
            out = nn.functional.dropout(scores.softmax(-1), training=self.training) @ v
        tokens = tokens + self.write(out.transpose(1, 2).flatten(2))
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, height))


class Gate(nn.Module):
    """Squeeze-and-excitation, or a map times a function of itself."""

    def __init__(self, width: int, squeezed: bool, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, 5, 1) if squeezed else nn.Linear(width, 5)
        self.up = nn.Conv2d(5, width, 1) if squeezed else nn.Linear(5, width)
        self.squeezed, self.activation = squeezed, activation

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.mean((2, 3), keepdim=True) if self.squeezed else x.permute(0, 2, 3, 1)
        gate = self.activation(self.up(torch.relu(self.down(pixels))))
        return gate * x if self.squeezed else x * gate.permute(0, 3, 1, 2)


class Normed(nn.Module):
    """A convolution of the padded map less the map, behind a norm over groups."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3), norm
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(nn.functional.pad(x, (2, 0, 1, 1))) - x))


class Shuffle(nn.Module):
    """Channels of two halves in turn, behind a convolution of one half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.conv(right)], 1)
        images, width, height, _ = x.shape
        x = x.view(images, 2, width // 2, height, height)
        return x.transpose(1, 2).reshape(images, width, height, height)


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        made.weight.uniform_(0.5, 1.5)
        made.bias.uniform_(-0.3, 0.3)
        made.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
        made.running_var.uniform_(0.3, 1.5)  # type: ignore[union-attr]
    return made


def residual(net: RandomNetwork) -> nn.Module:
    width = net.channels
    first = net.conv(net.random.choice((4, 6)), strided=False)
    return nn.Sequential(first, net.conv(width, strided=False))


def preact(net: RandomNetwork) -> nn.Module:
    width = net.channels
    return nn.Sequential(norm(width), nn.ReLU(), net.conv(width, strided=False))


def concat(net: RandomNetwork) -> nn.Module:
    width = net.channels
    part = net.conv(net.random.choice((2, 4)), strided=False)
    net.channels += width
    return part


def mlp(net: RandomNetwork) -> nn.Module:
    return MLP(net.channels, net.random.choice((5, 16)), net.random.choice(SMOOTH)())


def attention(net: RandomNetwork) -> nn.Module:
    heads = net.random.choice([h for h in (1, 2, 3, 4) if net.channels % h == 0])
    how = net.random.choice(("function", "module", "spelled out"))
    return Attention(net.channels, heads, net.side, how)


def gate(net: RandomNetwork) -> nn.Module:
    squeezed = net.random.random() < 0.7
    return Gate(net.channels, squeezed, net.random.choice((nn.Sigmoid, nn.Hardsigmoid, nn.ReLU))())


def normed(net: RandomNetwork) -> nn.Module:
    width = net.channels
    groups = net.random.choice([g for g in (1, 2, 3, 4) if width % g == 0])
    norms = (nn.GroupNorm(groups, width), nn.GroupNorm(width, width, affine=False))
    return Normed(width, net.random.choice((*norms, nn.InstanceNorm2d(width, affine=True))))


def shuffle(net: RandomNetwork) -> nn.Module:
    return Shuffle(net.channels) if net.channels % 2 == 0 else nn.Identity()


def pool(net: RandomNetwork) -> nn.Module:
    if net.side < 4:
        return nn.Identity()
    up = net.random.random() < 0.3
    pools = (nn.MaxPool2d(2, ceil_mode=up), nn.AvgPool2d(2, ceil_mode=up), nn.MaxPool2d(3, 2, 1))
    made = net.random.choice(pools)
    net.side = (net.side + (made.ceil_mode or made.kernel_size == 3)) // 2
    return made


BLOCKS: dict[str, Callable[[RandomNetwork], nn.Module]] = {
    "conv": lambda net: net.conv(net.random.choice((4, 6, 9, 16))),
    "conv, same": lambda net: net.conv(net.channels),
    "depthwise": lambda net: net.conv(net.channels, depthwise=True),
    "residual": residual,
    "preact": preact,
    "concat": concat,
    "pool": pool,
    "mlp": mlp,
    "attention": attention,
    "gate": gate,
    "shuffle": shuffle,
    "normed": normed,
}


def close(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda text: f"{what}: {text}")


@dataclass(frozen=True)
class Case:
    net: RandomNetwork
    traced: Trace
    pruned: Tensor
    images: Tensor
    want: Tensor
    """Logits [B, N, K], by hooks."""

    @property
    def convolutional(self) -> bool:
        """Whether the GPU's plan can run it."""
        smooth = (nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid)
        smooth += (nn.LayerNorm, Attention, Gate, Normed)
        return not any(isinstance(module, smooth) for module in self.net.modules())


def case(seed: int) -> Case:
    net = RandomNetwork(seed).eval()
    traced = trace(net, (3, net.size, net.size))
    images = torch.rand(3, 3, net.size, net.size)
    pruned = torch.rand(3, traced.sites) < 0.3
    want = torch.stack([hooked_logits(net, traced, mask, images) for mask in pruned])
    return Case(net, traced, pruned, images, want)


@pytest.mark.parametrize("seed", range(12))
def test_gpu_plan(seed: int) -> None:
    one = case(seed)
    if one.convolutional:
        plan = masked_forward_gpu.lower(one.traced, one.net, DEVICE, "fp32")
        close(plan.run(one.pruned, one.images).cpu(), one.want, f"seed {seed}, {one.net.kinds}")
    else:
        with pytest.raises(UnsupportedOperation):
            masked_forward_gpu.lower(one.traced, one.net, DEVICE, "fp32")


@pytest.mark.parametrize("first", range(0, NETWORKS, PART))
def test_random_networks(first: int) -> None:
    for seed in range(first, first + PART):
        one = case(seed)
        net, traced, pruned, images, want = one.net, one.traced, one.pruned, one.images, one.want
        what = f"seed {seed}, {net.kinds}"
        plain = FrozenNetwork(traced, net, native=False)
        gates = (~pruned).float()
        with torch.no_grad():
            close(torch.stack([plain(images, gate) for gate in gates]), want, f"torch, {what}")
        plan = masked_forward.lower(traced, net)
        close(plan.run(masks.pack(pruned), images), want, f"native, {what}")
        leaves = images.requires_grad_(True), torch.rand(3, traced.sites).requires_grad_(True)
        pull = torch.randn(3, 4)
        got = torch.autograd.grad(masked_gradient.lower(traced, net)(*leaves), leaves, pull)
        expected = torch.autograd.grad(plain(*leaves), leaves, pull, allow_unused=True)
        for one, other in zip(got, expected, strict=True):
            close(one, torch.zeros_like(one) if other is None else other, f"gradient, {what}")


def test_random_surgery() -> None:
    """Masks of scattered sites and whole groups: as weights, and as a smaller network."""
    smaller_ones = 0
    for seed in range(100):
        one = case(seed)
        random = torch.Generator().manual_seed(seed)
        groups = torch.rand(int(one.traced.group_of_site.max()) + 1, generator=random) < 0.3
        pruned = one.pruned[0] | groups[one.traced.group_of_site]
        want = hooked_logits(one.net, one.traced, pruned, one.images)
        what = f"seed {seed}, {one.net.kinds}"
        smaller, _ = remove_mask(one.net, one.traced, pruned)
        with torch.no_grad():
            close(apply_mask(one.net, one.traced, pruned)(one.images), want, f"applied, {what}")
            close(smaller(one.images), want, f"removed, {what}")
        sizes = [sum(p.numel() for p in net.parameters()) for net in (smaller, one.net)]
        smaller_ones += sizes[0] < sizes[1]
    assert smaller_ones > 80
