"""One call on a GPU machine: build with CUDA, run the GPU tests, time kernels and whole repairs.

``python -m bench.gpu`` needs nvcc, a CUDA build of torch and the packages of ``[test]``; it
downloads nothing. Each stage is a process of its own with a time limit, ten minutes together, and
its result is written at once, so that a machine taken away costs the rest alone. Compiled kernels
are kept under build/ from one stage, and call, to the next.

build    the package with its CUDA kernels, for the machine's GPUs alone
tests    those that need a GPU, and of the kernels all
memcheck compute-sanitizer on a few of them, where it is installed
kernels  the table of kernels (``bench.kernels``)
zoo      four networks of full width, trained on the spot (DATA)
repairs  those four, repaired and scored (``bench.end_to_end``)

STAGES="build tests ..."       which stages run, in this order (default: all)
DATA=folder                    with cifar10.zip, for the last two; without it they are left out
OUT=folder                     where results go (default: bench/results)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.files import slug

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "gpu-site"
ZOO = ROOT / "build" / "gpu-zoo"
OUT = Path(os.environ.get("OUT") or ROOT / "bench" / "results").resolve()
DATA = os.environ.get("DATA")

_PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps")
_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
_WORKERS = ("-n", "8") if importlib.util.find_spec("xdist") else ()
_CHECKED = ("tests/ops/test_neuron_graph.py", "tests/ops/test_message_passing.py")
"""What memcheck runs: it makes kernels many times slower."""


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


def build() -> tuple[str, ...]:
    """Compile with CUDA into a folder of its own, apart from any installed onp."""
    target = ("--upgrade", "--target", str(SITE))
    options = ("ONP_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=90a-real")
    settings = [part for option in options for part in ("-C", f"cmake.define.{option}")]
    return (*_PIP, *target, *settings, "-C", "build-dir=build/gpu", ".")


def tests() -> tuple[str, ...]:
    """The tests that need a GPU, and those of the kernels."""
    ops = ("masked_forward_gpu", "masked_gradient_gpu", "message_passing", "neuron_graph")
    return (*_PYTEST, *_WORKERS, *(f"tests/ops/test_{name}.py" for name in ops),
            "tests/suspect/test_replayed.py", "tests/test_evaluate.py", "tests/test_graph.py",
            "tests/test_sanitize.py::test_the_whole_path_on_cuda")  # fmt: skip


def memcheck() -> tuple[str, ...]:
    """Out-of-bounds accesses on a GPU, by compute-sanitizer."""
    checked = ("compute-sanitizer", "--error-exitcode", "9", "--require-cuda-init", "no")
    return (*checked, *_PYTEST, "-m", "gpu", *_CHECKED)


def kernels() -> tuple[str, ...]:
    """The table of kernels."""
    return (sys.executable, "-m", "bench.kernels", "--device", "cuda", "--out",
            str(OUT / f"kernels_{gpu_name()}.json"))  # fmt: skip


def zoo() -> tuple[str, ...]:
    """Train the set ``gpu``."""
    return (sys.executable, "-m", "bench.zoo", "--set", "gpu", "--device", "cuda", "--data",
            str(DATA), "--out", str(ZOO))  # fmt: skip


def repairs() -> tuple[str, ...]:
    """Repair it."""
    return (sys.executable, "-m", "bench.end_to_end", "--set", "gpu", "--device", "cuda", "--data",
            str(DATA), "--models-dir", str(ZOO), "--repeats", "2",
            "--out", str(OUT / f"end_to_end_{gpu_name()}.jsonl"))  # fmt: skip


STAGES = {
    "build": Stage(build, 60),
    "tests": Stage(tests, 150),
    "memcheck": Stage(memcheck, 30),
    "kernels": Stage(kernels, 180),
    "zoo": Stage(zoo, 90),
    "repairs": Stage(repairs, 90),
}
NEED_DATA = {"zoo", "repairs"}


def main() -> int:
    """Run the stages that were asked for; 0 if each succeeded."""
    argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()  # fmt: skip
    names = os.environ.get("STAGES", "").split() or [
        name for name in STAGES if DATA or name not in NEED_DATA
    ]
    unknown = set(names) - STAGES.keys()
    if unknown:
        print(f"STAGES takes {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
        return 4
    if not DATA and NEED_DATA & set(names):
        print("the stages zoo and repairs need DATA, the folder with cifar10.zip")
        return 4
    if "memcheck" in names and shutil.which("compute-sanitizer") is None:
        print("memcheck is left out: compute-sanitizer is not installed")
        names.remove("memcheck")
    OUT.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in names:
        outcomes.append(_run(name, STAGES[name]))
        print(f"== {outcomes[-1]}", flush=True)
        record = {"machine": _machine(), "stages": [asdict(outcome) for outcome in outcomes]}
        (OUT / f"gpu_{gpu_name()}.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(outcome.returncode == 0 for outcome in outcomes) else 1


def _run(name: str, stage: Stage) -> Outcome:
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
    return Outcome(name, returncode, round(time.monotonic() - started, 1))


def _environment() -> dict[str, str]:
    paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
    caches = {
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton-cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor-cache"),
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | caches | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@cache
def gpu_name() -> str:
    """The GPU's name as part of a file's."""
    query = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    return slug(done.stdout.splitlines()[0])


def _machine() -> dict[str, Any]:
    """The facts of ``onp doctor``, as far as the package is built."""
    command = (sys.executable, "-m", "onp", "doctor", "--json")
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=60
    )
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        facts = {"error": done.stderr[-500:]}
    return facts


if __name__ == "__main__":
    sys.exit(main())
