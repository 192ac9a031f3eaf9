"""Where a command says what: results go to stdout, all else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from onp.errors import ResourceError


def say(text: str) -> None:
    """Print a result."""
    with _written():
        print(text, flush=True)


def flush_stdout() -> None:
    """See to it that what was printed has been written."""
    with _written():
        if sys.stdout is not None:
            sys.stdout.flush()


@contextmanager
def _written() -> Iterator[None]:
    """A reader that has gone is no error, and the exit code is as it would be; raises ResourceError
    where a result cannot be written, as on a full disk."""
    try:
        yield
    except BrokenPipeError:
        _let_go(sys.stdout)
    except OSError as error:
        _let_go(sys.stdout)
        raise ResourceError(f"cannot write the result to stdout: {error.strerror}") from None


def tell(line: str) -> None:
    """Print a line on stderr, if anybody listens: who does not does not stop the work."""
    if sys.stderr is None:  # closed by whoever started the process
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _let_go(sys.stderr)


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """What a user's own code prints meanwhile is no result."""
    with redirect_stdout(sys.stderr or open(os.devnull, "w")):  # to the end
        yield


def _let_go(stream: TextIO) -> None:
    """Python would write what is left when it ends, and end by another exit code."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
