"""Parts of the zoo that are kept out of what is fitted: some attacks, or an architecture."""

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
