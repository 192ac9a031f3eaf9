"""Children that die take one task with them, and no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from onp.batch import supervisor
from onp.batch.supervisor import Lost, supervise
from onp.errors import ResourceError
from tests.batch.children import dies_at_once, serve


def _run(
    tasks: list[Any], log: Path, children: int = 2, timeout: float | None = None
) -> dict[Any, Any]:
    results = list(supervise(tasks, serve, [str(log)], children=children, timeout=timeout))
    assert len(results) == len(tasks)
    assert not multiprocessing.active_children()
    return {task: result.reason if isinstance(result, Lost) else result for task, result in results}


def _asked(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


def _children(log: Path) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("children", [1, 3])
def test_every_task_has_its_result(children: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert _run([*range(7)], log, children) == {task: 2 * task for task in range(7)}
    assert sorted(_asked(log)) == [str(task) for task in range(7)]
    assert len(set(_children(log))) <= children  # a child takes one task after another


def test_no_task_needs_no_child(tmp_path: Path) -> None:
    assert _run([], tmp_path / "log") == {}


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        ("exit", "its process ended with code 3"),
        ("kill", "its process ended by signal 9; memory may have run out"),
        ("raise", "its process ended with code 1"),
    ],
)
def test_a_death_costs_one_task_after_a_second_try(death: str, reason: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert _run([1, death, 2, 3], log) == {1: 2, 2: 4, 3: 6, death: reason}
    assert _asked(log).count(death) == 2
    assert _asked(log)[-1] == death  # when the others are done,
    assert _children(log).count(_children(log)[-1]) == 1  # in a child of its own


def test_what_died_by_chance_gets_its_result(tmp_path: Path) -> None:
    assert _run(["once", 1, 2], tmp_path / "log") == {"once": "once 2", 1: 2, 2: 4}


def test_a_task_may_ask_for_a_second_try_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert _run(["again", 1, 2], log) == {"again": "again 2", 1: 2, 2: 4}
    assert _asked(log)[-1] == "again"


def test_a_child_may_say_that_a_task_was_its_last(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert _run(["last", 1], log, children=1) == {"last": "last 1", 1: 2}
    assert len(set(_children(log))) == 2


def test_all_may_die(tmp_path: Path) -> None:
    assert set(_run(["exit", "kill"], tmp_path / "log")) == {"exit", "kill"}


def test_children_that_cannot_start_are_one_error() -> None:
    with pytest.raises(ResourceError, match="cannot start: its process ended with code 7"):
        list(supervise([1, 2], dies_at_once, [], children=1))
    assert not multiprocessing.active_children()


def test_an_interrupt_is_the_parents_business(tmp_path: Path) -> None:
    blocked = _run(["mask", "mask too"], tmp_path / "log")
    assert set(blocked.values()) == {True}


def test_an_idle_child_that_is_gone_costs_no_task(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = supervise([1, 2, 3], serve, [str(log)], children=1)
    assert next(results) == (1, 2)
    os.kill(int(_children(log)[0]), signal.SIGKILL)
    time.sleep(0.5)
    assert list(results) == [(2, 4), (3, 6)]
    assert len(_asked(log)) == 3


def test_what_takes_too_long_is_ended_and_not_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = _run([1, "sleep", 2], log, children=1, timeout=0.5)
    assert results == {1: 2, 2: 4, "sleep": "it took more than 0.5 s"}
    assert _asked(log).count("sleep") == 1


def test_whoever_stops_listening_leaves_no_child(tmp_path: Path) -> None:
    results = supervise([1, "sleep", 2], serve, [str(tmp_path / "log")], children=2)
    next(results)
    results.close()
    assert not multiprocessing.active_children()


def test_fewer_children_than_asked_for_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, started = supervisor._Child, []

    def scarce(*arguments: Any) -> Any:
        if len(started) == 1:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(None)
        return child(*arguments)

    monkeypatch.setattr(supervisor, "_Child", scarce)
    assert _run([1, 2, 3], tmp_path / "log", children=3) == {1: 2, 2: 4, 3: 6}
    with pytest.raises(ResourceError, match="cannot start a process: Resource temporarily"):
        _run([1], tmp_path / "log")


PARENT = """
import sys
from onp.batch.supervisor import supervise
from tests.batch.children import serve

if __name__ == "__main__":
    for task, result in supervise(["print", "sleep"], serve, [sys.argv[1]], children=1):
        print(result, flush=True)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_their_parent_and_print_nothing_on_stdout(
    ending: int, tmp_path: Path
) -> None:
    script, log = tmp_path / "parent.py", tmp_path / "log"
    script.write_text(PARENT)
    paths = [Path(__file__).parents[2], Path(supervisor.__file__).parents[2]]
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths))}
    parent = subprocess.Popen(
        [sys.executable, script, log], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (log.exists() and "sleep" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(ending)
    told, errors = parent.communicate(timeout=30)  # a child that lived would keep the pipes open
    assert told == "print 1\n"
    assert "not for stdout" in errors
