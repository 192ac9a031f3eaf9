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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any

from onp.errors import ResourceError

_SPAWN = get_context("spawn")
_PATIENCE = 10.0
"""Seconds that a child which has closed its pipe, or was killed, may take to be gone."""
_START = 600.0
"""Seconds that a child may take until it is ready for work."""
_LONGEST = 3600.0
"""Seconds in one call of ``wait``."""


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


def obey(pipe: Connection, work: Callable[[Any], Reply]) -> None:
    """A child's life, once it is ready: receive a task, send its ``Reply``, until the pipe ends or
    a reply was the last; end at once if the parent does, however it ended. What it prints goes to
    stderr."""
    os.set_inheritable(pipe.fileno(), False)  # its end is told by this process alone
    os.dup2(2, 1)
    Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(None)
    goes_on = True
    while goes_on:
        try:
            reply = work(pipe.recv())
        except EOFError:
            return
        pipe.send(reply)
        goes_on = reply.goes_on


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Child:
    """A process and the task that it has."""

    def __init__(self, serve: Callable[..., None], arguments: Sequence[Any]) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here
        self.ready = False
        self.task: Any = None
        self.last_try = False
        self.timeout = self.deadline = math.inf

    def give(self, task: Any, timeout: float | None, last_try: bool = False) -> None:
        self.task, self.last_try = task, last_try
        self.timeout = math.inf if timeout is None else timeout
        self.deadline = time.monotonic() + (self.timeout if self.ready else _START)
        with suppress(OSError):  # a child that has died is seen when its result is asked for
            self.pipe.send(task)

    def reply(self) -> Reply | Lost | None:
        """What it sent, or Lost; None if that is only that it is ready."""
        if not self.pipe.poll():
            patience = self.timeout if self.ready else _START
            return Lost(f"it took more than {patience:g} s" + (not self.ready) * " to start")
        try:
            reply: Reply | None = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_PATIENCE)
            return Lost(_ending(self.process.exitcode))
        if reply is None:
            self.ready, self.deadline = True, time.monotonic() + self.timeout
        return reply

    @property
    def late(self) -> bool:
        return self.deadline <= time.monotonic()

    def stop(self) -> None:
        self.process.kill()
        self.pipe.close()
        self.process.join(_PATIENCE)


def supervise(
    tasks: Sequence[Any],
    serve: Callable[..., None],
    arguments: Sequence[Any],
    *,
    children: int,
    timeout: float | None = None,
) -> Generator[tuple[Any, Any]]:
    """Have ``children`` processes work on the tasks; yields each with its result as it comes.

    ``serve(pipe, *arguments)`` runs in every child and calls ``obey``. A task whose child dies, or
    asks for it, is given once more when all others are done, to a new child with none beside it; if
    that one dies too, or a task takes longer than ``timeout`` seconds, the result is ``Lost``.
    Tasks, arguments and results are pickled; ``arguments`` must be small (a start would wait for
    the child to read them). Raises ResourceError if no child can be started, or the first to start
    ends before it is ready.
    """
    first, again = deque(tasks), deque[Any]()
    idle, busy = list[_Child](), list[_Child]()
    started = False
    try:
        while first or again or busy:
            while first and len(busy) < max(1, children):
                child = _one_more(busy, idle, serve, arguments)
                if child is None:
                    break
                child.give(first.popleft(), timeout)
            while idle and not first:  # what they hold is of use to others
                idle.pop().stop()
            if not first and not busy:
                child = _one_more(busy, idle, serve, arguments)
                assert child is not None
                child.give(again.popleft(), timeout, last_try=True)
            for child in _done(busy):
                late, reply = child.late, child.reply()
                started = started or child.ready
                if reply is None:
                    continue
                busy.remove(child)
                if isinstance(reply, Reply) and reply.goes_on:
                    idle.append(child)
                else:
                    child.stop()
                if isinstance(reply, Lost) and not started:
                    raise ResourceError(f"a child process cannot start: {reply.reason}")
                once_more = not late if isinstance(reply, Lost) else reply.again
                if once_more and not child.last_try:
                    again.append(child.task)
                else:
                    yield child.task, reply if isinstance(reply, Lost) else reply.result
    finally:
        for child in idle + busy:
            child.stop()


def _one_more(
    busy: list[_Child], idle: list[_Child], serve: Callable[..., None], arguments: Sequence[Any]
) -> _Child | None:
    """One more of the busy: an idle child that lives, or a new one; None if none can be started
    beside those that are."""
    while idle:
        child = idle.pop()
        if child.process.is_alive():
            busy.append(child)
            return child
        child.stop()
    try:
        with _undisturbed():
            busy.append(_Child(serve, arguments))
    except OSError as error:
        if busy:
            return None
        raise ResourceError(f"cannot start a process: {error.strerror or error}") from None
    return busy[-1]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Interrupts wait until a child that is started here is known; it inherits that they do, as
    they are the parent's business."""
    resource_tracker.ensure_running()  # or else the first start does that, and clears the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(busy: Sequence[_Child]) -> list[_Child]:
    """Waits until some of the children have said something, have died or are late; these."""
    patience = max(0.0, min(child.deadline for child in busy) - time.monotonic())
    ready = wait([child.pipe for child in busy], min(patience, _LONGEST))
    return [child for child in busy if child.pipe in ready or child.late]


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; memory may have run out" if code == -signal.SIGKILL else ""
        return f"its process ended by signal {-code}{hint}"
    return f"its process ended with code {code}"
