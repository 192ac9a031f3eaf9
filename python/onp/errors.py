"""Every error that onp raises on purpose. The command line maps each class to an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


def quoted(text: object, limit: int = 80) -> str:
    """Untrusted text for a one-line message: quoted, printable ASCII, cut at ``limit``."""
    shown = str(text)
    return ascii(shown if len(shown) <= limit else shown[:limit] + "...")


class OnpError(Exception):
    """Base of all errors raised by onp; the message is one line that says what to do."""

    exit_code = 2


class UnsafeOrCorruptModel(OnpError):
    """The suspect file or its weights cannot be used: unsafe, damaged, or not of that network."""


class UntraceableModel(OnpError):
    """The network holds an operation that cannot be turned into sites; the message names it."""


class UnsupportedOperation(OnpError):
    """The network is traceable, but the native engine lacks one of its operations."""


class BadData(OnpError):
    """The clean images or labels cannot be used."""


class UnsupportedInput(OnpError):
    """No reader takes this kind of input."""

    exit_code = 3


class UsageError(OnpError):
    """The call's options contradict each other or are out of range."""

    exit_code = 4


class ResourceError(OnpError):
    """Memory, disk or another resource ran out; the same call may succeed elsewhere."""

    exit_code = 5


class NotBuiltError(OnpError):
    """The native part that was asked for is not in this build."""

    exit_code = 5


class NativeError(OnpError):
    """The native core refused its arguments."""


_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


@dataclass(frozen=True)
class Explained:
    """What to tell of an error."""

    message: str
    """One line."""
    exit_code: int
    foreseen: bool = True
    """Or else its traceback is worth showing."""
    ran_out: bool = False
    """Memory, disk or the like: the same may work elsewhere, or later."""


def explained(error: Exception) -> Explained:
    """What to tell of any error. One that memory's running out led to is told as that."""
    if any(_ran_out_of_memory(one) for one in _origins(error)):
        message = "memory ran out; try fewer clean samples"
        return Explained(message, ResourceError.exit_code, ran_out=True)
    if isinstance(error, OnpError):
        ran_out = isinstance(error, ResourceError)
        return Explained(" ".join(str(error).split()), error.exit_code, ran_out=ran_out)
    message = " ".join(f"internal: {type(error).__name__}: {error}".split())
    return Explained(message, OnpError.exit_code, foreseen=False)


def _ran_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OnpError):
        return False
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def _origins(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised for, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
