"""One call on a GPU machine: build with CUDA, run the GPU tests, time each kernel.

``python -m bench.gpu`` needs nvcc, a CUDA build of torch and the packages of ``[test]``; it
downloads nothing. Each stage is a process of its own with a time limit, nine minutes together, and
its result is written at once, so that a machine taken away costs the rest alone.

STAGES="build tests kernels"   which stages run, in this order
OUT=folder                     where results go (default: bench/results/gpu)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "gpu-site"
OUT = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu").resolve()

_PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps")
_PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take."""

    command: Callable[[], tuple[str, ...]]
    limit: int
    """Seconds."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    stage: str
    returncode: int | None
    """None: stopped at the time limit."""
    seconds: float
    rows: list[dict[str, Any]]
    """Timings, one a benchmark."""


def build() -> tuple[str, ...]:
    """Compile with CUDA into a folder of its own, apart from any installed onp."""
    target = ("--upgrade", "--target", str(SITE))
    return (*_PIP, *target, "-C", "cmake.define.ONP_CUDA=ON", "-C", "build-dir=build/gpu", ".")


def tests() -> tuple[str, ...]:
    """The tests that need a GPU."""
    return (*_PYTEST, "tests")


def kernels() -> tuple[str, ...]:
    """The benchmarks that need a GPU."""
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "bench").glob("bench_*.py"))]
    options = ("--benchmark-enable", "--benchmark-only", f"--benchmark-json={_timings()}")
    return (*_PYTEST, *options, *files)


STAGES = {"build": Stage(build, 200), "tests": Stage(tests, 170), "kernels": Stage(kernels, 150)}


def main() -> int:
    """Run the stages that were asked for; 0 if each succeeded."""
    names = os.environ.get("STAGES", "").split() or list(STAGES)
    unknown = set(names) - STAGES.keys()
    if unknown:
        print(f"STAGES takes {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
        return 4
    OUT.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in names:
        outcomes.append(_run(name, STAGES[name]))
        (OUT / f"{name}.json").write_text(json.dumps(asdict(outcomes[-1]), indent=2) + "\n")
        if name == "build":
            _describe_machine()
    for outcome in outcomes:
        ending = "time limit" if outcome.returncode is None else f"exit {outcome.returncode}"
        print(f"{outcome.stage:<8} {ending:<10} {outcome.seconds:6.1f} s")
        for row in outcome.rows:
            print(f"  {row['name']:<70} {1e3 * row['median']:10.4f} ms")
    return 0 if all(outcome.returncode == 0 for outcome in outcomes) else 1


def _run(name: str, stage: Stage) -> Outcome:
    _timings().unlink(missing_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(
        stage.command(), cwd=ROOT, env=_environment(), start_new_session=True
    )
    try:
        returncode: int | None = process.wait(stage.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers and test workers under it too
        process.wait()
        returncode = None
    return Outcome(name, returncode, time.monotonic() - started, _rows())


def _environment() -> dict[str, str]:
    paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _describe_machine() -> None:
    """Write the facts of ``onp doctor`` beside the timings."""
    command = (sys.executable, "-m", "onp", "doctor", "--json")
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=60
    )
    (OUT / "machine.json").write_text(done.stdout or json.dumps({"error": done.stderr}))


def _timings() -> Path:
    return OUT / "timings.json"


def _rows() -> list[dict[str, Any]]:
    """Name and seconds of each benchmark that the last stage timed."""
    if not _timings().exists() or not _timings().stat().st_size:
        return []
    benchmarks = json.loads(_timings().read_text())["benchmarks"]
    kept = ("min", "median", "stddev", "rounds")
    return [{"name": b["name"], **{key: b["stats"][key] for key in kept}} for b in benchmarks]


if __name__ == "__main__":
    sys.exit(main())
