"""Constants fitted with some networks left out."""

from __future__ import annotations

from pathlib import Path

from bench.folds.__main__ import MADE_FOR, Rows, folds
from bench.folds.constants import CONSTANTS, SHIPPED, Setting, configured, fitted, settings
from bench.train_agent.__main__ import folds as taught_without
from bench.train_agent.__main__ import kept_out_of
from bench.zoo.checkpoints import ZooModel
from bench.zoo.recipes import CORE
from onp.config import Config

NETWORKS = [ZooModel(r, {}, Path()) for r in CORE if r.attack != "clean"]


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


def test_folds_are_those_that_policies_are_taught_without() -> None:
    taught = taught_without(NETWORKS)
    for _, fold, kept_out in folds(NETWORKS):
        found = {n.name for n in NETWORKS if kept_out_of(taught[fold], n.recipe)}
        assert found == kept_out


def test_every_attack_on_one_class_has_a_family_that_was_made_for_it() -> None:
    attacks = {network.recipe.attack for network in NETWORKS}
    assert attacks - {"badnets-all"} == set(MADE_FOR)
    assert set(MADE_FOR.values()) == set(Config().replay.families)


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"model": "a", "setting": [1.5, 2.0], "without": null, "policy": "none", "seed": 0}\n'
    )
    assert ("a", (1.5, 2.0), None, "none", 0) in Rows(path).made
    assert not Rows(tmp_path / "none.jsonl").made
