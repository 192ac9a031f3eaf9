"""``python -m bench.scoreboard``: every defence on every network of a set; see ``--help``."""

from __future__ import annotations

import sys

from bench.defences import DEFENCES
from bench.scoreboard.cli import main
from bench.zoo.checkpoints import load_set
from bench.zoo.datasets import load

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load_set, load, DEFENCES))
