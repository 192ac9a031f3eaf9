"""``python -m bench.kernels``: one table of kernels, each against what users have, in one run.

A row is printed when it is made; a wrong result has no speed. All rows, with the machine's measured
ceilings, go to --out, after every row. ``--quick`` has fewer masks, images and repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from bench.files import slug
from bench.kernels import (
    convolution_gpu,
    masked_forward,
    masked_forward_gpu,
    masked_gradient,
    message_passing,
    neuron_graph,
    recorded,
    unlearning,
)
from bench.kernels.peak import Ceilings
from bench.kernels.rows import Row, as_json, compared, table
from bench.scoreboard.provenance import provenance
from onp.files import write_json

_BENCH = Path(__file__).parents[1]
SUITES = {
    "masked_forward": masked_forward.rows,
    "masked_forward_others": masked_forward.others,
    "masked_gradient": masked_gradient.rows,
    "unlearning": unlearning.rows,
    "recorded": recorded.rows,
    "neuron_graph": neuron_graph.rows,
    "message_passing": message_passing.rows,
}
GPU_SUITES = {
    "masked_forward": masked_forward_gpu.rows,
    "message_passing": partial(message_passing.rows, device="cuda"),
    "convolution": convolution_gpu.rows,
    "neuron_graph": partial(neuron_graph.rows, device="cuda"),
    "masked_gradient": partial(masked_gradient.rows, device="cuda"),
    "masked_forward_others": masked_forward_gpu.others,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    names = sorted({*SUITES, *GPU_SUITES})
    parser.add_argument("--suites", nargs="*", choices=names, help="default: all of the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=None, help="default: 3; with --quick 1")
    parser.add_argument("--out", type=Path, help="default: bench/results/kernels_cpu.json or "
                        "kernels_<gpu>.json; with --quick or some suites alone none")  # fmt: skip
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    suites = GPU_SUITES if on_gpu else SUITES
    wanted = args.suites or list(suites)
    if unknown := set(wanted) - suites.keys():
        parser.error(f"--device {args.device} has no suite {', '.join(sorted(unknown))}")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda was asked for, but torch sees no CUDA device here")
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    ceilings = Ceilings.measured_on_gpu() if on_gpu else Ceilings.measured(args.threads)
    print(f"{ceilings} with {args.threads} threads", file=sys.stderr, flush=True)
    rows: list[Row] = []
    repeats = args.repeats or (1 if args.quick else 3)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    out = args.out
    if out is None and not args.quick and set(wanted) == set(suites):
        out = _BENCH / "results" / f"kernels_{slug(name)}.json"
    before = time.perf_counter()
    for suite in wanted:
        for made in suites[suite](args.quick, repeats, ceilings):
            now = time.perf_counter()
            row, before = replace(made, took=round(now - before, 1)), now
            print(json.dumps(as_json([row])[0]), flush=True)
            rows.append(row)
            facts = {"device": name, "ceilings": asdict(ceilings), "quick": args.quick}
            facts |= {"repeats": repeats, "seconds": round(time.perf_counter() - started)}
            if out is not None:
                rows_so_far = as_json(compared(rows))
                write_json(out, {"environment": facts | provenance(), "rows": rows_so_far})
    print(table(compared(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
