"""The defences of the scoreboard by name; all have the form of ``bench.defences.api.Defence``."""

from __future__ import annotations

from bench.defences.anp import anp
from bench.defences.api import Defence
from bench.defences.bnp import bnp
from bench.defences.clp import clp
from bench.defences.fp import fp
from bench.defences.onp_defence import onp_defence
from bench.defences.probe_race import probe_race
from bench.defences.rnp import rnp

DEFENCES: dict[str, Defence] = {
    "fp": fp,
    "anp": anp,
    "clp": clp,
    "bnp": bnp,
    "rnp": rnp,
    "probe-race": probe_race,
    "onp": onp_defence,
}
