"""The defences of the scoreboard by name; all have the form of ``bench.defences.api.Defence``."""

from __future__ import annotations

from bench.defences.anp import anp
from bench.defences.api import Defence
from bench.defences.bnp import bnp
from bench.defences.clp import clp
from bench.defences.fp import fp
from bench.defences.ft import fine_tuning
from bench.defences.ft_sam import sharpness_aware_tuning
from bench.defences.i_bau import implicit_unlearning
from bench.defences.nad import attention_distillation
from bench.defences.nc import neural_cleanse
from bench.defences.onp_defence import onp_defence
from bench.defences.probe_race import probe_race
from bench.defences.rnp import rnp

DEFENCES: dict[str, Defence] = {
    "ft": fine_tuning,
    "fp": fp,
    "nad": attention_distillation,
    "anp": anp,
    "clp": clp,
    "bnp": bnp,
    "rnp": rnp,
    "i-bau": implicit_unlearning,
    "ft-sam": sharpness_aware_tuning,
    "nc": neural_cleanse,
    "probe-race": probe_race,
    "onp": onp_defence,
}
