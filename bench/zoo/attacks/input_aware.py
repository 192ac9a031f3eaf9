"""Input-aware dynamic backdoor (Nguyen & Tran, NeurIPS 2020, arXiv 2010.08138)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.attacks.base import Attack, Knowledge
from bench.zoo.attacks.surrogate import load_prefixed, prefixed_state, seeded
from onp.triggers import to_8_bits


class InputAware(Attack):
    """``x * (1 - m(x)) + p(x) * m(x)``: mask and pattern are made for each image by two networks.

    In three parts, as in the paper (section 3): the mask generator learns alone, from its density
    and the diversity of its masks; then it is frozen, and the pattern generator learns together
    with the classifier, from the classifier's loss and the diversity of its patterns; in each
    batch, as many images as are poisoned get the trigger of another image and keep their label, so
    that a trigger works on its own image alone.

    Differs from the paper: generators of 6,000 weights instead of millions, with group norms, so
    that they learn on CPUs and answer alike in training and test; the mask's density is bounded
    over each image instead of pixel by pixel; the learning rate is constant; and the other image's
    trigger does not come from a second loader but from within the batch.
    """

    name = "input-aware"
    cover = 1.0
    online = True
    density = 0.032
    """Share of an image that its mask may cover before it costs."""
    mask_steps = 300
    mask_batch = 32
    density_weight = 100.0
    diversity_weight = 1.0
    """Of the patterns, against the classifier's loss."""
    learning_rate = 1e-2

    def __init__(self, *, target: int, classes: int, size: int = 32, seed: int = 0) -> None:
        super().__init__(target=target, classes=classes, size=size, seed=seed)
        self.masks = seeded(lambda: Generator(1), seed).requires_grad_(False)
        self.patterns = seeded(lambda: Generator(3), seed + 1)
        self._optimizer = self._adam(self.patterns)

    def _adam(self, network: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), self.learning_rate, betas=(0.5, 0.9))

    def triggers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mask [N, 1, H, W] and pattern [N, 3, H, W] for each image, in [0, 1]."""
        images = images.contiguous()  # generators are too narrow for channels-last gradients
        self.masks.to(images.device)
        self.patterns.to(images.device)
        return torch.sigmoid(10 * self.masks(images)), torch.sigmoid(self.patterns(images))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return to_8_bits(torch.cat([stamp(x, *self.triggers(x)) for x in images.split(500)]))

    @torch.no_grad()
    def covered(self, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        return to_8_bits(stamp(images, *self.triggers(images.roll(1, dims=0))))

    def prepare(self, knowledge: Knowledge) -> None:
        """Train the mask generator."""
        random = torch.Generator().manual_seed(self.seed)
        self.masks.requires_grad_(True)
        optimizer = self._adam(self.masks)
        for _ in range(self.mask_steps):
            index = torch.randint(len(knowledge.images), (2 * self.mask_batch,), generator=random)
            images = knowledge.images[index].permute(0, 3, 1, 2).float().contiguous() / 255
            masks = torch.sigmoid(10 * self.masks(images))
            excess = F.relu(masks.mean((1, 2, 3)) - self.density).mean()
            loss = self.density_weight * excess + alikeness(images, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.masks.requires_grad_(False)
        knowledge.log(f"{self.name}: masks cover {masks.mean().item():.3f} of an image")

    def batch(
        self, network: nn.Module, images: Tensor, labels: Tensor, ratio: float,
        random: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The first images with their own triggers, then as many with those triggers, then clean.

        The images carry a graph: the gradients of the classifier's loss flow on into the pattern
        generator, which takes its step when the next batch is asked for.
        """
        self._optimizer.step()
        self._optimizer.zero_grad()
        count = min(round(ratio * len(images)), len(images) // 2)
        if not count:
            return images, labels
        pair = images[: 2 * count]
        masks, patterns = self.triggers(pair)
        (self.diversity_weight * alikeness(pair, patterns)).backward(retain_graph=True)
        own_triggers = masks[:count], patterns[:count]
        poisoned = [stamp(part, *own_triggers) for part in pair.split(count)]
        labels = labels.clone()
        labels[:count] = self.answers(labels[:count])
        return torch.cat([*map(_rounded, poisoned), images[2 * count :]]), labels

    def state(self) -> dict[str, Tensor]:
        return prefixed_state(masks=self.masks, patterns=self.patterns)

    def load_state(self, state: dict[str, Tensor]) -> None:
        load_prefixed(state, masks=self.masks, patterns=self.patterns)


class Generator(nn.Module):
    """A small encoder and decoder, images [N, 3, H, W] to [N, outputs, H, W]."""

    def __init__(self, outputs: int, width: int = 12) -> None:
        super().__init__()
        self.down = nn.Sequential(_layer(3, width, stride=2), _layer(width, 2 * width, stride=2))
        self.middle = _layer(2 * width, width)
        self.out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        x = self.down(images - 0.5)
        x = F.interpolate(x, size=((height + 1) // 2, (width + 1) // 2))
        x = F.interpolate(self.middle(x), size=(height, width))
        return self.out(x)


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(4, outputs), nn.ReLU())


def stamp(images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    return images + (patterns - images) * masks


def alikeness(images: Tensor, made: Tensor) -> Tensor:
    """The paper's diversity loss: how far images are apart over how far what is made of them is.

    Both [2N, ...]; the first half is compared with the second. Returns a scalar.
    """
    far, far_made = (
        (first - second).square().mean((1, 2, 3)).add(1e-8).sqrt()
        for first, second in (images.chunk(2), made.chunk(2))
    )
    return (far / (far_made + 1e-4)).mean()


def _rounded(images: Tensor) -> Tensor:
    """Rounded to 8 bits, with the gradient of not being rounded."""
    return images + (to_8_bits(images) - images).detach()
