"""Parts of the zoo that are kept out of what is fitted: some attacks, or an architecture.

``badnets-all`` and ``badnets`` share a patch, and count as two attacks, in two folds.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.zoo.recipes import Recipe

ATTACK_FOLDS = 4


def folds(recipes: Iterable[Recipe]) -> dict[str, set[str]]:
    """Attacks, or architectures, that each fold keeps out, by the fold's name: ``attacks0`` to
    ``attacks3``, and every architecture."""
    backdoored = [recipe for recipe in recipes if recipe.attack != "clean"]
    attacks = sorted({recipe.attack for recipe in backdoored})
    made = {f"attacks{part}": set(attacks[part::ATTACK_FOLDS]) for part in range(ATTACK_FOLDS)}
    return made | {arch: {arch} for arch in sorted({recipe.arch for recipe in backdoored})}


def kept_out(fold: set[str], recipe: Recipe) -> bool:
    """Whether a network, of whatever set, has an attack or an architecture of the fold's."""
    return bool(fold & {recipe.attack, recipe.arch})


def attack_fold(all_recipes: Iterable[Recipe], recipe: Recipe) -> str:
    """Name of the fold that keeps a network's attack out; raises KeyError where none does."""
    for name, fold in folds(all_recipes).items():
        if name.startswith("attacks") and recipe.attack in fold:
            return name
    raise KeyError(f"no fold keeps {recipe.attack} out")
