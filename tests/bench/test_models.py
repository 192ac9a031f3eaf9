"""The checkpoints that are kept in the repository: they load, are fair, small, and as told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.zoo.checkpoints import ZooModel, load_set
from bench.zoo.recipes import CLEAN, CORE, UNSEEN

FOLDER = Path(__file__).parents[2] / "bench" / "zoo" / "models"
MODELS = [*load_set("core", FOLDER), *load_set("clean", FOLDER), *load_set("unseen", FOLDER)]
MOST_BYTES, MOST_BYTES_TOGETHER = 1_500_000, 25_000_000


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_checkpoint_is_what_its_card_says(model: ZooModel) -> None:
    card, recipe = model.card, model.recipe
    assert (card["name"], card["attack"], card["arch"]) == (model.name, recipe.attack, recipe.arch)
    assert card["fair"]
    assert card["twin"] is None or (FOLDER / f"{card['twin']}.safetensors").exists()
    assert sum(p.numel() for p in model.model.parameters()) == card["parameters"]
    assert (FOLDER / f"{model.name}.safetensors").stat().st_size <= MOST_BYTES
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.model(images).shape == (4, card["classes"])
    if model.attack is None:
        assert card["asr"] is None
        assert card["trigger_fingerprint"] is None
    else:
        triggered = model.attack(images)
        assert triggered.shape == images.shape
        assert not torch.equal(triggered, images)
        assert card["asr"] > card["asr_clean_twin"]


def test_nothing_else_is_kept() -> None:
    files = sorted(path for path in FOLDER.iterdir() if path.name != "README.md")
    names = {recipe.name for recipe in [*CORE, *CLEAN, *UNSEEN]}
    for path in files:
        assert any(path.name.startswith(f"{name}.") for name in names), path.name
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES_TOGETHER
