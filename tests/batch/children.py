"""What children of the supervisor's tests do: nothing heavy is imported, they start often."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from onp.batch.supervisor import Reply, obey


def serve(pipe: Connection, log: str) -> None:
    """Doubles numbers. A task may be a text instead: how it ends."""
    obey(pipe, lambda task: _reply(task, Path(log)))


def _reply(task: Any, log: Path) -> Reply:
    with log.open("a") as file:
        file.write(f"{task} {os.getpid()}\n")
    tries = sum(line.split()[0] == task for line in log.read_text().splitlines())
    if task == "exit":
        os._exit(3)
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError
    if task == "sleep":
        time.sleep(60)
    if task == "once" and tries == 1:
        os._exit(1)
    if isinstance(task, str) and task.startswith("mask"):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return Reply({signal.SIGINT, signal.SIGTERM} <= blocked)
    if task == "print":
        print("not for stdout", flush=True)
    if isinstance(task, str):
        return Reply(f"{task} {tries}", goes_on=task != "last", again=task == "again")
    return Reply(2 * task)


def dies_at_once(_pipe: Connection) -> None:
    os._exit(7)
