"""Constants fitted with some networks left out."""

from __future__ import annotations

from pathlib import Path

from bench.folds.__main__ import MADE_FOR, Rows
from bench.folds.constants import CONSTANTS, SHIPPED, Setting, configured, fitted, settings
from bench.zoo.folds import attack_fold, folds, kept_out
from bench.zoo.recipes import CORE, PRACTICE
from onp.config import Config

BACKDOORED = [recipe for recipe in CORE if recipe.attack != "clean"]


def test_the_shipped_setting_is_the_configuration_itself() -> None:
    assert configured(Config(), SHIPPED) == Config()
    assert len(set(settings())) == 1 + sum(len(values) - 1 for values in CONSTANTS.values())
    for setting in settings()[1:]:
        assert configured(Config(), setting) != Config()


def test_networks_that_are_kept_out_have_no_say() -> None:
    """One network is best at a high weight, the other at a low one."""

    def ders(setting: Setting) -> dict[str, float]:
        return {"high": setting[0], "low": -setting[0]}

    values = CONSTANTS["success"]
    assert fitted(ders, {"low"}) == (max(values), *SHIPPED[1:])
    assert fitted(ders, {"high"}) == (min(values), *SHIPPED[1:])


def test_every_network_is_kept_out_once_by_attack_and_once_by_kind() -> None:
    made = folds(CORE)
    for recipe in BACKDOORED:
        out = [name for name, fold in made.items() if kept_out(fold, recipe)]
        assert sum(name.startswith("attacks") for name in out) == 1
        assert len(out) == 2
        assert attack_fold(CORE, recipe) in out


def test_no_network_of_any_set_brings_back_what_a_fold_keeps_out() -> None:
    for fold in folds(CORE).values():
        taught = [r for r in [*CORE, *PRACTICE] if not kept_out(fold, r)]
        assert taught
        assert not fold & {r.attack for r in taught}
        assert not fold & {r.arch for r in taught}


def test_every_attack_on_one_class_has_a_family_that_was_made_for_it() -> None:
    attacks = {recipe.attack for recipe in BACKDOORED}
    assert attacks - {"badnets-all"} == set(MADE_FOR)
    assert set(MADE_FOR.values()) == set(Config().replay.families)


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"model": "a", "setting": [1.5, 2.0], "without": null, "policy": "none", "seed": 0, '
        '"clean_samples": 500, "test_images": 2000}\n'
    )
    assert ("a", None, "none", 0, 500, 2000, (1.5, 2.0)) in Rows(path).made
    assert not Rows(tmp_path / "none.jsonl").made
