"""``python -m bench.kernels``: one table of kernels, each against what users have, in one run.

A row is printed when it is made; a wrong result has no speed. All rows, with the machine's measured
ceilings, go to --out. ``--quick`` has fewer masks, images and repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bench.kernels import masked_forward, message_passing, neuron_graph
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row, as_json, compared, table
from bench.scoreboard.provenance import provenance
from onp.files import write_json

_BENCH = Path(__file__).parents[1]
SUITES = {
    "masked_forward": masked_forward.rows,
    "neuron_graph": neuron_graph.rows,
    "message_passing": message_passing.rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--suites", nargs="*", choices=sorted(SUITES), default=list(SUITES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=None, help="default: 3; with --quick 1")
    parser.add_argument("--out", type=Path, help="default: bench/results/kernels_cpu.json; "
                        "with --quick or some suites alone none")  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    ceilings = Ceilings.measured(args.threads)
    print(f"{ceilings} with {args.threads} threads", file=sys.stderr, flush=True)
    rows: list[Row] = []
    repeats = args.repeats or (1 if args.quick else 3)
    for suite in args.suites:
        for row in SUITES[suite](args.quick, repeats, ceilings):
            print(json.dumps(as_json([row])[0]), flush=True)
            rows.append(row)
    rows = compared(rows)
    print(table(rows))
    facts = {"ceilings": asdict(ceilings), "quick": args.quick, "repeats": repeats}
    facts |= {"seconds": round(time.perf_counter() - started), **provenance()}
    out = args.out
    if out is None and not args.quick and set(args.suites) == set(SUITES):
        out = _BENCH / "results" / "kernels_cpu.json"
    if out is not None:
        write_json(out, {"environment": facts, "rows": as_json(rows)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
