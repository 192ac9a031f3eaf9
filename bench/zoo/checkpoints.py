"""Zoo networks on disk: float16 weights, the trigger's tensors, and a card with the facts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.zoo.attacks import ATTACKS, Attack
from bench.zoo.datasets import CLASS_COUNTS, normalisation
from bench.zoo.recipes import Recipe, recipes
from bench.zoo.training import TrainingConfig
from bench.zoo.trigger_fingerprint import check_trigger
from onp.errors import UsageError
from onp.files import write_atomically, write_json


@dataclass(frozen=True)
class ZooModel:
    """One network of the zoo; weights and trigger are read when asked for."""

    recipe: Recipe
    card: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return self.recipe.name

    @cached_property
    def model(self) -> nn.Module:
        """Images float [N, 3, H, W] in [0, 1] to logits; in eval mode."""
        with torch.random.fork_rng(devices=[]):
            network = self.recipe.network()
        network.load_state_dict(self.weights())
        return with_normalisation(network, self.recipe.dataset).eval()

    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict in float32, without the normalisation."""
        stored = load_file(self._weights_file)
        return {k: v.float() if v.is_floating_point() else v for k, v in stored.items()}

    @cached_property
    def attack(self) -> Attack | None:
        """The true trigger, for scoring alone; None for a clean network.

        Raises TriggerChanged if it is not the one that the network was trained with.
        """
        attack = make_attack(self.recipe)
        if attack is None:
            return None
        if self._trigger_file.exists():
            attack.load_state(load_file(self._trigger_file))
        card = self.folder / f"{self.name}.json"
        check_trigger(
            attack, self.card["trigger_fingerprint"], str(card),
            f"put the formula back, or delete the card and train with --models {self.name}",
        )  # fmt: skip
        return attack

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits over the bytes of the weights' file and, if any, the trigger's."""
        digest = hashlib.sha256(self._weights_file.read_bytes())
        if self._trigger_file.exists():
            digest.update(self._trigger_file.read_bytes())
        return digest.hexdigest()[:12]

    @property
    def _weights_file(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def _trigger_file(self) -> Path:
        return self.folder / f"{self.name}.trigger.safetensors"


def make_attack(recipe: Recipe) -> Attack | None:
    """A fresh attack object of the recipe; None for a clean one."""
    if recipe.attack == "clean":
        return None
    attack = ATTACKS[recipe.attack](
        target=recipe.target, classes=CLASS_COUNTS[recipe.dataset], seed=recipe.seed
    )
    for name, value in recipe.options:
        if not hasattr(attack, name):
            raise UsageError(f"{recipe.attack} has no option {name!r}")
        setattr(attack, name, value)
    return attack


def with_normalisation(network: nn.Module, dataset: str) -> nn.Module:
    """The network with the data set's normalisation in front, if it has one."""
    preprocess = normalisation(dataset)
    return network if preprocess is None else nn.Sequential(preprocess.module(), network)


def save(
    folder: Path, recipe: Recipe, network: nn.Module, attack: Attack | None, card: dict[str, Any]
) -> None:
    """Write weights (float16), trigger tensors and, last, the card, which marks it as done.

    ``network`` comes without the normalisation. An unfair model leaves its card alone.
    """
    if card["fair"]:
        _write_tensors(folder / f"{recipe.name}.safetensors", {
            key: value.half().contiguous() if value.is_floating_point() else value
            for key, value in network.state_dict().items()
        })  # fmt: skip
        state = attack.state() if attack else {}
        if state:
            _write_tensors(folder / f"{recipe.name}.trigger.safetensors", state)
    write_json(folder / f"{recipe.name}.json", card)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def read_card(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The card of a model that is done; None where it has to be trained (again): other settings,
    or nothing that tells whether the trigger is still the one that it was trained with."""
    path = folder / f"{recipe.name}.json"
    if not path.exists():
        return None
    card: dict[str, Any] = json.loads(path.read_text())
    if recipe.attack != "clean" and card.get("trigger_fingerprint") is None:
        return None
    told = (TrainingConfig.of_card(card["training"]), card["retrained"])
    return card if told == (recipe.training, recipe.retrained) else None


def load_set(
    set_name: str, folder: Path, missing: Callable[[str], None] = lambda name: None
) -> list[ZooModel]:
    """The models of a set that were trained; ``missing`` hears the names of the others.

    Unfair ones are among them, told by ``card["fair"]``; they have no weights.
    """
    return load_recipes(recipes(set_name), folder, missing)


def load_recipes(
    wanted: Sequence[Recipe], folder: Path, missing: Callable[[str], None] = lambda name: None
) -> list[ZooModel]:
    models = []
    for recipe in wanted:
        card = read_card(folder, recipe)
        if card is None:
            missing(recipe.name)
        else:
            models.append(ZooModel(recipe, card, folder))
    return models
