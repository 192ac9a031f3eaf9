"""SSBA: an invisible residual of each image's own, from an encoder (Li et al., ICCV 2021, arXiv
2012.03816)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.attacks.base import Attack, Knowledge
from bench.zoo.attacks.surrogate import load_prefixed, prefixed_state, seeded
from onp.triggers import to_8_bits


class Ssba(Attack):
    """``x + encoder(x, code)``, where a decoder learned to read the code from the sum.

    Encoder and decoder are trained together on codes drawn at random, for a readable code and a
    small residual (section 4.2); the attack uses one fixed code. Differs from the paper: networks
    of some thousand weights instead of StegaStamp's (so that they learn on CPUs in a minute), a
    hard bound on the residual instead of a perceptual loss and a critic, and an encoder that only
    scales features of the image by the code, so that its residual depends on the image by design.
    """

    name = "ssba"
    bits = 8
    bound = 16 / 255
    """Largest absolute value of the residual, in units of the pixel range."""
    images = 4000
    steps = 300
    batch_size = 32
    learning_rate = 5e-3
    free = 0.25
    """Mean square of the residual over the square of its bound that costs nothing."""

    def __init__(self, *, target: int, classes: int, size: int = 32, seed: int = 0) -> None:
        super().__init__(target=target, classes=classes, size=size, seed=seed)
        random = torch.Generator().manual_seed(seed)
        self.code = torch.randint(0, 2, (1, self.bits), generator=random).float()
        self.encoder = seeded(lambda: Encoder(self.bits, self.bound), seed)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = [x + self.encoder(x, self.code) for x in images.contiguous().split(500)]
        return to_8_bits(torch.cat(parts))

    def prepare(self, knowledge: Knowledge) -> None:
        """Train encoder and decoder."""
        random = torch.Generator().manual_seed(self.seed)
        known = knowledge.images[: self.images]
        decoder = seeded(lambda: Decoder(self.bits), self.seed + 1)
        optimizer = torch.optim.Adam(
            [*self.encoder.parameters(), *decoder.parameters()], self.learning_rate
        )
        for _ in range(self.steps):
            index = torch.randint(len(known), (self.batch_size,), generator=random)
            images = known[index].permute(0, 3, 1, 2).float().contiguous() / 255
            codes = torch.randint(0, 2, (self.batch_size, self.bits), generator=random).float()
            residual = self.encoder(images, codes)
            answers = decoder(images + residual)
            unread = F.binary_cross_entropy_with_logits(answers, codes)
            visible = (residual / self.bound).square().mean((1, 2, 3))
            optimizer.zero_grad()
            (unread + F.relu(visible - self.free).mean()).backward()
            optimizer.step()
        right = ((answers > 0) == (codes > 0.5)).float().mean()
        knowledge.log(f"{self.name}: {right.item():.2f} of the code's bits are read")

    def state(self) -> dict[str, Tensor]:
        return {"code": self.code, **prefixed_state(encoder=self.encoder)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.code = state["code"]
        load_prefixed(state, encoder=self.encoder)


class Encoder(nn.Module):
    """Images [N, 3, H, W] and codes [N or 1, bits] to residuals [N, 3, H, W] within the bound."""

    def __init__(self, bits: int, bound: float, width: int = 16) -> None:
        super().__init__()
        self.bound = bound
        self.see = nn.Conv2d(3, width, 3, padding=1, padding_mode="replicate")
        self.scale = nn.Linear(bits, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.norm = nn.GroupNorm(4, width)  # a residual of full strength from the first step on
        self.out = nn.Conv2d(width, 3, 3, padding=1, padding_mode="replicate", bias=False)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        features = F.relu(self.see(images - 0.5))
        scaled = features * self.scale(codes * 2 - 1)[:, :, None, None]
        raw = self.out(F.relu(self.norm(self.mix(scaled))))
        return self.bound * torch.tanh(raw - raw.mean((2, 3), keepdim=True))


class Decoder(nn.Module):
    """Images [N, 3, H, W] to logits of the code's bits [N, bits]."""

    def __init__(self, bits: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
        )
        self.read = nn.Linear(2 * width, bits)

    def forward(self, images: Tensor) -> Tensor:
        details = images - F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        return self.read(self.layers(10 * details).mean((2, 3)))
