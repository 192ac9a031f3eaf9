"""The command: what to run, running it, and what is printed and written of it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.defences.api import Defence
from bench.defences.told import TOLD
from bench.scoreboard.commands import commands
from bench.scoreboard.provenance import provenance
from bench.scoreboard.report import Report, public_context
from bench.scoreboard.rows import Key, Row, read_rows
from bench.scoreboard.run import Job, Runner, pending
from bench.scoreboard.scoring import Examiner, LoadImages, Subject
from bench.scoreboard.selection import current, reported
from bench.scoreboard.summary import summarise
from bench.side_by_side import run_side_by_side
from onp.errors import OnpError, UsageError

LoadSet = Callable[[str, Path, Callable[[str], None]], Sequence[Subject]]
"""(name of the set, folder of the checkpoints, what hears the names of networks that are not there)
to the networks of the set."""

_BENCH = Path(__file__).parents[1]
_CLEAN_SAMPLES = 500

_ROWS_ONLY = "--rows-only"
"""Option of the processes side by side: append rows, summarise nothing."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.scoreboard",
        description="Run defences on a set of networks; one JSON line per run, appended when it is "
        "done; a line that is there is not run again, unless it is of other weights than the "
        "network's. The options choose what runs and what is printed. The report beside the rows "
        "(.md, .svg) is written by every call, of all rows of the file whose networks are there.",
    )
    add = made.add_argument
    add("--set", default="core", help="name of the set of networks")
    add("--models-dir", type=Path, default=_BENCH / "zoo" / "models")
    add("--models", nargs="+", metavar="NAME", help="these networks alone")
    add(
        "--defences",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"names, or all but {', '.join(TOLD)} (told the trigger, or its class)",
    )
    add("--data", type=Path, help="folder with the data sets")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--clean-samples", type=int, default=_CLEAN_SAMPLES, help="training images for a defence")
    add("--test-images", type=int, default=4000, help="test images that score, at most")
    add("--out", type=Path, help="JSON lines (default: bench/results/scoreboard_<set>.jsonl)")
    add(
        "--oracle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score every candidate of a defence with the true trigger: a row marked oracle",
    )
    add("--oracle-images", type=int, help="test images to pick by; the pick is scored on all")
    add("--by", nargs="+", choices=("dataset", "arch", "attack"), default=[])
    add("--leaderboard", type=Path, metavar="CSV", help="BackdoorBench's results.csv, for context")
    add("--json", action="store_true", help="print the summary as JSON")
    add("--summary-only", action="store_true", help="run nothing")
    add("--retry-errors", action="store_true", help="run again what failed")
    add(
        "--rerun",
        nargs="+",
        default=[],
        metavar="NAME",
        help="run these of the defences again, whatever rows they have; new rows take their place",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        help="networks side by side, each with its part of the cores; the costly ones start first, "
        "and wall clocks are those of a shared machine",
    )
    add(_ROWS_ONLY, action="store_true", help=argparse.SUPPRESS)
    return made


def main(
    argv: Sequence[str], load_set: LoadSet, load: LoadImages, defences: Mapping[str, Defence]
) -> int:
    """0: done; 1: something failed and the rest is done; 2: wrong call; 130: interrupted."""
    args = parser().parse_args(argv)
    try:
        return _main(args, load_set, load, defences)
    except OnpError as error:
        print(f"scoreboard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        anew = " (--rerun starts anew)" if args.rerun else ""
        print("scoreboard: interrupted; finished rows are kept, the same call goes on from there"
              + anew, file=sys.stderr)  # fmt: skip
        return 130


def _main(
    args: argparse.Namespace,
    load_set: LoadSet,
    load: LoadImages,
    defences: Mapping[str, Defence],
) -> int:
    absent: list[str] = []
    found = load_set(args.set, args.models_dir, absent.append)
    subjects = {str(subject.card["name"]): subject for subject in found}
    names = chosen("network", args.models or ["all"], subjects)
    told = [name for name in TOLD if name in args.defences]
    named = [name for name in args.defences if name not in TOLD]
    wanted = [*(chosen("defence", named, defences) if named else []), *told]
    rerun = chosen("defence", args.rerun, dict.fromkeys(wanted))
    seeds = list(dict.fromkeys(args.seeds))
    fair = {name: subject.card for name, subject in subjects.items() if subject.card["fair"]}
    cards = [fair[name] for name in names if name in fair]
    not_trained = dict.fromkeys(absent, "not trained")
    not_fair = {
        name: str(subject.card["why_not_fair"])
        for name, subject in subjects.items()
        if name not in fair
    }
    left_out = {name: why for name, why in not_fair.items() if name in names} | not_trained
    for name, reason in left_out.items() if not args.rows_only else ():
        print(f"left out: {name}: {reason}", file=sys.stderr)

    out = args.out or default_out(args.set, args.clean_samples)
    in_file = read_rows(out, repair=not (args.summary_only or args.rows_only))
    rows = current(in_file, subjects)
    if len(rows) < len(in_file) and not args.rows_only:
        print(f"{len(in_file) - len(rows)} rows of {out} are of other weights than the networks "
              "that are there: they count as absent", file=sys.stderr)  # fmt: skip
    _check_samples(out, rows, args.clean_samples)
    broken: list[str] = []
    if not args.summary_only:
        jobs = [
            Job(card["name"], defence, seed, args.clean_samples, args.oracle)
            for card in cards
            for defence in wanted
            for seed in seeds
            if defence not in TOLD or card["attack"] != "clean"
        ]
        anew = [job for job in jobs if job.defence in rerun]
        outdated = {key for job in anew for key in (job.key, job.oracle_key)}
        kept = {key: row for key, row in rows.items() if key not in outdated}
        todo = pending(jobs, kept, retry_errors=args.retry_errors)
        if not args.rows_only:
            print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {out}", file=sys.stderr)
        if args.jobs > 1 and not args.rows_only:
            left = costly_first(todo, cards)
            codes = run_side_by_side("bench.scoreboard", left, _options(args, out), args.jobs)
            broken = [f"{name}: exit code {code}" for name, code in codes.items() if code]
        else:
            examiner = Examiner(
                subjects,
                load,
                data=args.data,
                test_images=args.test_images,
                clean_samples=args.clean_samples,
                seeds=seeds,
            )
            measured = provenance() | {"jobs": args.jobs}
            runner = Runner(subjects, defences, examiner, out, measured, args.oracle_images)
            broken = runner.run(todo, kept)
        if args.rows_only:
            return 1 if broken else 0
        rows = current(read_rows(out), subjects)

    whole = reported(rows, fair, [*defences, *TOLD])
    shown = [
        row for row in whole if row.model in names and row.defence in wanted and row.seed in seeds
    ]
    report = _report(args, shown, cards, left_out, list(fair))
    print(report.as_json() if args.json else report.markdown(), end="")
    if whole:
        _report(args, whole, list(fair.values()), not_fair | not_trained, list(fair)).write(out)
    return 0 if args.summary_only else _outcome(shown, broken)


def _report(
    args: argparse.Namespace,
    rows: Sequence[Row],
    cards: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str],
    networks: Sequence[str],
) -> Report:
    """``rows`` are of the networks of ``cards``; ``networks`` are the names of the whole set's."""
    extra = ["--out", args.out.name] if args.out else []
    extra += ["--leaderboard", args.leaderboard.name] if args.leaderboard else []
    extra += ["--by", *args.by] if args.by else []
    return Report(
        title=f"{args.set}, {args.clean_samples} clean images",
        commands=commands(args.set, networks, rows, extra),
        rows=rows,
        summary=summarise(rows, cards, sorted({row.seed for row in rows}), args.by),
        left_out=left_out,
        public=public_context(args.leaderboard, rows) if args.leaderboard else {},
    )


def _outcome(rows: Sequence[Row], broken: Sequence[str]) -> int:
    """Say what failed; the exit code."""
    failed = [row for row in rows if row.error is not None]
    if failed:
        defences = ", ".join(sorted({row.defence for row in failed}))
        print(
            f"scoreboard: errors in rows of {defences} ({len(failed)}); --retry-errors runs them "
            "again",
            file=sys.stderr,
        )
    return 1 if failed or broken else 0


def chosen(kind: str, names: Sequence[str], known: Mapping[str, object]) -> list[str]:
    """``names`` without repeats, ``all`` spelt out. Raises UsageError listing the known ones."""
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown:
        raise UsageError(f"unknown {kind} {', '.join(unknown)}; there are: {', '.join(known)}")
    return list(known) if "all" in names else list(dict.fromkeys(names))


def costly_first(jobs: Sequence[Job], cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the networks of ``jobs``, by jobs times parameters, so that none is left alone at
    the end for long."""
    parameters = {card["name"]: card["parameters"] for card in cards}
    costs = Counter[str]()
    for job in jobs:
        costs[job.model] += parameters[job.model]
    return [name for name, _ in costs.most_common()]


def default_out(set_name: str, clean_samples: int) -> Path:
    """Another number of clean images has a file of its own."""
    suffix = "" if clean_samples == _CLEAN_SAMPLES else f"_{clean_samples}clean"
    return _BENCH / "results" / f"scoreboard_{set_name}{suffix}.jsonl"


def _check_samples(out: Path, rows: Mapping[Key, Row], clean_samples: int) -> None:
    others = {row.clean_samples for row in rows.values()} - {clean_samples}
    if others:
        raise UsageError(
            f"{out} holds rows of {sorted(others)} clean images: use another --out for "
            f"{clean_samples}"
        )


def _options(args: argparse.Namespace, out: Path) -> list[str]:
    """What makes the rows of a part of the call's networks, given ``--models``.

    Such a process runs its networks in turn; ``--jobs`` tells it, for the rows, how many networks
    run side by side.
    """
    options = ["--set", args.set, "--models-dir", str(args.models_dir), "--out", str(out)]
    options += ["--defences", *args.defences, "--seeds", *map(str, args.seeds)]
    options += ["--clean-samples", str(args.clean_samples), "--test-images", str(args.test_images)]
    options += ["--data", str(args.data)] if args.data else []
    options += ["--oracle" if args.oracle else "--no-oracle"]
    options += ["--oracle-images", str(args.oracle_images)] if args.oracle_images else []
    options += ["--retry-errors"] if args.retry_errors else []
    options += ["--rerun", *args.rerun] if args.rerun else []
    options += ["--jobs", str(args.jobs), _ROWS_ONLY]
    return options
