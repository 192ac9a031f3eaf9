"""A trigger of no particular kind: one map, and what a small network adds to each image."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from onp.probes.families import Range


class Generator:
    """images + map + network(images), unbounded: for losses that bound it themselves."""

    name = "generator"
    learning_rate = 0.005
    map_scale = 4.0
    """Of the range that one unit of the map is: it learns that much faster than the network."""
    hidden = 16
    """Channels between the network's convolutions."""

    def start(
        self, probes: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> list[Tensor]:
        """The map, then weight and bias of three 3x3 convolutions; the last starts at 0."""
        sizes = [shape[0], self.hidden, self.hidden, shape[0]]
        parameters = [torch.zeros(probes, 1, *shape)]
        for place, (read, made) in enumerate(itertools.pairwise(sizes)):
            bound = 0.0 if place == 2 else (9 * read) ** -0.5
            weight = torch.rand(probes, made, read, 3, 3, generator=generator) * 2 - 1
            parameters += [weight * bound, torch.zeros(probes, made)]
        return parameters

    def apply(self, parameters: list[Tensor], images: Tensor, valid: Range) -> Tensor:
        low, high = valid
        maps, *layers = parameters
        out = []
        for place, pixels in enumerate(images):
            h = (pixels - low) / (high - low) - 0.5
            for weight, bias in zip(layers[::2], layers[1::2], strict=True):
                h = F.conv2d(h, weight[place], bias[place], padding=1)
                h = F.relu(h) if weight is not layers[-2] else h
            out.append(pixels + (high - low) * (self.map_scale * maps[place] + h))
        return torch.stack(out).clamp(low, high)

    def project(self, parameters: list[Tensor], valid: Range) -> None:
        """Only pixels are bounded."""

    def size(self, parameters: list[Tensor], valid: Range) -> Tensor:
        """Root mean square of the map, as a share of the range."""
        return self.map_scale * parameters[0].flatten(1).square().mean(1).sqrt()

    def penalty(self, parameters: list[Tensor]) -> Tensor:
        return torch.zeros(len(parameters[0]))
