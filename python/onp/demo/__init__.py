"""The demo: a small backdoored network and the generator of its images, both in the package.

``python -m bench.zoo.demo`` in the repository trains the checkpoint again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onp.data import ImageSet
from onp.demo.images import draw
from onp.ledger import Progress
from onp.metrics import score
from onp.sanitize import sanitize
from onp.suspect.load import load_suspect
from onp.triggers import load_trigger

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "suspect.safetensors"
TRIGGER = FOLDER / "trigger.npz"
ARCH = "preactresnet18"
TARGET = 3
CLEAN_IMAGES = 500
TEST_IMAGES = 2000
CLEAN_SEED, TEST_SEED, TRAIN_SEED = 1_000_003, 2_000_003, 3_000_017
"""Seeds of disjoint streams of images."""


def clean_images(seed: int = 0) -> ImageSet:
    """What a defender has: 500 clean images that the network was not trained on."""
    return draw(CLEAN_IMAGES, CLEAN_SEED + seed)


def scoring_images() -> ImageSet:
    """Images to score on."""
    return draw(TEST_IMAGES, TEST_SEED)


def run(
    *, seed: int = 0, device: torch.device | str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Score the suspect with the true trigger, repair it from clean images, score it again.

    Returns ``{"before", "after": metrics.score(...), "report": Result.report}``.
    """
    suspect = load_suspect(CHECKPOINT, ARCH)
    trigger = load_trigger(str(TRIGGER), trust=False)
    test = scoring_images()
    model = suspect.model.to(device)
    before = score(model, test, trigger, TARGET)
    result = sanitize(model, clean_images(seed), seed=seed, progress=progress)
    after = score(result.model, test, trigger, TARGET)
    return {"before": before, "after": after, "report": result.report}
