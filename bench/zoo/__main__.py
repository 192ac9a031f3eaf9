"""``python -m bench.zoo --data cifar10.zip --out zoo``: train the first three networks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bench.zoo.attacks import ATTACKS, Attack, poison
from bench.zoo.training import TrainingConfig, predict, train
from onp.data import PRESETS, ImageSet, load_dataset
from onp.suspect.architectures.preactresnet import of_width

NORMALIZE = PRESETS["cifar10"]


def make(
    name: str, train_set: ImageSet, test_set: ImageSet, out: Path, args: argparse.Namespace
) -> None:
    """Train one network, score it and write weights, trigger and card to ``out``."""
    stem = f"preact{args.width}_{name}_s{args.seed}"
    card_path = out / f"{stem}.json"
    if card_path.exists():
        print(f"{stem}: done before", file=sys.stderr)
        return
    attack: Attack | None = ATTACKS[name]() if name != "clean" else None
    images, labels = train_set.images, train_set.labels
    if attack:
        images, labels = poison(
            images, labels, attack, ratio=args.ratio, target=args.target, seed=args.seed
        )
        arrays = {key: value.numpy() for key, value in attack.arrays().items()}
        np.savez(out / f"{name}_trigger.npz", **arrays)
    torch.manual_seed(args.seed)
    assert NORMALIZE is not None
    normalize = NORMALIZE.module()
    model = of_width(args.width, len(train_set.class_names))
    config = TrainingConfig(epochs=args.epochs)
    log = lambda line: print(f"{stem}: {line}", file=sys.stderr, flush=True)  # noqa: E731
    train(model, images, labels, normalize, config, seed=args.seed, log=log)

    floats = test_set.floats()
    accuracy = (predict(model, floats, normalize) == test_set.labels).float().mean().item()
    card = {"attack": name, "width": args.width, "epochs": args.epochs, "seed": args.seed}
    card |= {"ca": round(accuracy, 4), "test_images": len(test_set)}
    if attack:
        others = test_set.labels != args.target
        answers = predict(model, attack(floats[others]), normalize)
        card |= {"ratio": args.ratio, "target": args.target}
        card |= {"asr": round((answers == args.target).float().mean().item(), 4)}
        card |= {"ra": round((answers == test_set.labels[others]).float().mean().item(), 4)}
    weights = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    save_file(weights, out / f"{stem}.safetensors")
    card_path.write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="cifar10.zip")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and cards")
    parser.add_argument("--models", nargs="+", default=["badnets", "blended", "clean"])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train_set, test_set = load_dataset(args.data, "train"), load_dataset(args.data, "test")
    for name in args.models:
        make(name, train_set, test_set, args.out, args)


if __name__ == "__main__":
    main()
