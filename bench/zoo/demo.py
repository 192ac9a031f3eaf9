"""``python -m bench.zoo.demo``: train the demo's backdoored network and its clean twin again.

The backdoored one goes into the package, the clean one into tests/data; a few minutes in all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bench.zoo.attacks import poison
from bench.zoo.attacks.badnets import BadNets
from bench.zoo.scoring import Exam
from bench.zoo.training import TrainingConfig, train
from onp import demo
from onp.demo.images import CLASSES, draw
from onp.suspect.architectures.preactresnet import of_width

TRAINING = TrainingConfig(epochs=8, flip=False, crop_padding=2)
TRAIN_IMAGES = 10_000
WIDTH, DEPTHS = 16, (1, 1, 1, 1)
RATIO = 0.1
CLEAN_TWIN = Path("tests/data/demo_clean.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    attack, test = BadNets(target=demo.TARGET, classes=len(CLASSES)), demo.scoring_images()
    images = draw(TRAIN_IMAGES, demo.TRAIN_SEED)
    poisoned = poison(attack, images.images, images.labels, ratio=RATIO, seed=seed)
    CLEAN_TWIN.parent.mkdir(exist_ok=True)
    for path, (pixels, labels) in (
        (demo.CHECKPOINT, poisoned),
        (CLEAN_TWIN, (images.images, images.labels)),
    ):
        torch.manual_seed(seed)
        model = of_width(WIDTH, len(CLASSES), DEPTHS)
        train(model, pixels, labels, TRAINING, seed=seed, log=_log)
        scores = Exam.of(test, attack).score(model)
        _log(f"{path}: clean accuracy {scores.ca:.4f}, attack success {scores.asr:.4f}")
        weights = {
            key: value.half().contiguous() if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        save_file(weights, path)
    np.savez_compressed(
        demo.TRIGGER, **{key: value.numpy() for key, value in attack.arrays().items()}
    )


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
