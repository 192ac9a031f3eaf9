"""The defences of the scoreboard by name; all have the form of ``bench.defences.api.Defence``."""

from __future__ import annotations

from bench.defences.api import Defence
from bench.defences.ft import fine_tuning
from bench.defences.ft_sam import sharpness_aware_tuning
from bench.defences.i_bau import implicit_unlearning
from bench.defences.nad import attention_distillation
from bench.defences.nc import neural_cleanse

DEFENCES: dict[str, Defence] = {
    "ft": fine_tuning,
    "nad": attention_distillation,
    "ft-sam": sharpness_aware_tuning,
    "i-bau": implicit_unlearning,
    "nc": neural_cleanse,
}
