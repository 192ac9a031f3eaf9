"""Processes that work on tasks and may die of them: the others go on.

Children are spawned, as a fork after an OpenMP region hangs. A pool of the standard library gives
up all tasks when one child dies.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any

from onp.errors import ResourceError

_SPAWN = get_context("spawn")
_PATIENCE = 10.0
"""Seconds that a child which has closed its pipe, or was killed, may take to be gone."""


@dataclass(frozen=True)
class Reply:
    """What a child sends for a task."""

    result: Any
    goes_on: bool = True
    """Whether the child takes another task; if not, another child does."""
    again: bool = False
    """Whether the task is to be tried once more, with nothing beside it."""


@dataclass(frozen=True)
class Lost:
    """A task without a result, and why."""

    reason: str
    pid: int | None
    """Of the child that had it, which is gone."""


def obey(pipe: Connection, work: Callable[[Any], Reply]) -> None:
    """A child's life: receive a task, send its ``Reply``, until the pipe ends or a reply was the
    last; end at once if the parent does, however it ended. What it prints goes to stderr."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    os.dup2(2, 1)
    goes_on = True
    while goes_on:
        try:
            reply = work(pipe.recv())
        except EOFError:
            return
        pipe.send(reply)
        goes_on = reply.goes_on


class _Child:
    """A process and the task that it has."""

    def __init__(self, serve: Callable[..., None], arguments: Sequence[Any]) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=serve, args=(theirs, *arguments), daemon=True)
        # An interrupt is the parent's business, from the child's first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()  # so that its end is seen here
        self.task: Any = None
        self.timeout = self.deadline = math.inf

    def give(self, task: Any, timeout: float | None) -> None:
        self.task = task
        self.timeout = math.inf if timeout is None else timeout
        self.deadline = time.monotonic() + self.timeout
        with suppress(OSError):  # a child that has died is seen when its result is asked for
            self.pipe.send(task)

    def reply(self) -> Reply | Lost:
        if not self.pipe.poll():
            return Lost(f"it took more than {self.timeout:g} s", self.process.pid)
        try:
            reply: Reply = self.pipe.recv()
            return reply
        except (EOFError, OSError):
            self.process.join(_PATIENCE)
            return Lost(_ending(self.process.exitcode), self.process.pid)

    @property
    def late(self) -> bool:
        return self.deadline <= time.monotonic()

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(_PATIENCE)


def supervise(
    tasks: Sequence[Any],
    serve: Callable[..., None],
    arguments: Sequence[Any],
    *,
    children: int,
    timeout: float | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Have ``children`` processes work on the tasks; yields each with its result as it comes.

    ``serve(pipe, *arguments)`` runs in every child and calls ``obey``. A task whose child dies, or
    asks for it, is given once more when all others are done, to a new child with none beside it; if
    that one dies too, or a task takes longer than ``timeout`` seconds, the result is ``Lost``.
    Tasks, arguments and results are pickled; ``arguments`` must be small (a start would wait for
    the child to read them). Raises ResourceError if no child can be started.
    """
    first, again = deque(tasks), deque[Any]()
    idle, busy = list[_Child](), list[_Child]()
    try:
        while first or again or busy:
            while first and len(busy) < children:
                child = _ready(idle, busy, serve, arguments)
                if child is None:
                    break
                busy.append(child)
                child.give(first.popleft(), timeout)
            last_try = not first and not busy
            if last_try:
                while idle:
                    idle.pop().stop()
                child = _ready(idle, busy, serve, arguments)
                assert child is not None
                busy.append(child)
                child.give(again.popleft(), timeout)
            for child in _done(busy):
                late, reply = child.late, child.reply()
                busy.remove(child)
                if isinstance(reply, Reply) and reply.goes_on:
                    idle.append(child)
                else:
                    child.stop()
                may_again = not last_try
                if isinstance(reply, Lost):
                    if may_again and not late:
                        again.append(child.task)
                    else:
                        yield child.task, reply
                elif reply.again and may_again:
                    again.append(child.task)
                else:
                    yield child.task, reply.result
    finally:
        for child in idle + busy:
            child.stop()


def _ready(
    idle: list[_Child], busy: Sequence[_Child], serve: Callable[..., None], arguments: Sequence[Any]
) -> _Child | None:
    """An idle child that lives, or a new one; None if none can be started beside the busy ones."""
    while idle:
        child = idle.pop()
        if child.process.is_alive():
            return child
        child.stop()
    try:
        return _Child(serve, arguments)
    except OSError as error:
        if busy:
            return None
        raise ResourceError(f"cannot start a process: {error.strerror or error}") from None


def _done(busy: Sequence[_Child]) -> list[_Child]:
    """Waits until some of the children have replied, have died or are late; these."""
    patience = max(0.0, min(child.deadline for child in busy) - time.monotonic())
    ready = wait([child.pipe for child in busy], None if math.isinf(patience) else patience)
    return [child for child in busy if child.pipe in ready or child.late]


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; memory may have run out: try fewer --jobs" if code == -signal.SIGKILL else ""
        return f"its process ended by signal {-code}{hint}"
    return f"its process ended with code {code}"
