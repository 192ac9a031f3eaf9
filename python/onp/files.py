"""Writing files so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from onp.errors import OnpError, ResourceError, UsageError

_CALLERS_FAULT = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def file_error(action: str, path: Path, error: OSError) -> OnpError:
    """The error to raise for ``error``: UsageError for a wrong path, else ResourceError."""
    kind = UsageError if error.errno in _CALLERS_FAULT else ResourceError
    return kind(f"cannot {action} {path}: {error.strerror or error}")


def check_writable(path: Path) -> None:
    """Raise UsageError or ResourceError now if ``write_atomically(path, ...)`` could not start."""
    temporary, _ = _create_temporary(path)
    temporary.unlink()


def make_folder(path: Path) -> None:
    """Make the folder and those above it, if they are not there. Raises UsageError or
    ResourceError, naming ``path``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error("make the folder", path, error) from None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place of ``path``.

    The content is on the disk before the name changes, and the name before this returns. The file
    gets mode 0644 less the umask. On any failure the temporary file is removed and ``path`` is as
    it was. Raises UsageError or ResourceError, naming ``path``, for an error of the file system.
    """
    target = Path(os.path.realpath(path))  # a link stays a link; the file it names is replaced
    temporary, mode = _create_temporary(path)
    try:
        try:
            write(temporary)
            temporary.chmod(mode)  # ``write`` may have put a new file in its place
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise file_error("write", path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinities raise ValueError."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what was begun to be written to the paths by processes that were killed. Nobody may
    be writing to them."""
    begun: dict[Path, set[str]] = {}
    for path in paths:
        target = Path(os.path.realpath(path))
        begun.setdefault(target.parent, set()).add(_mark(target))
    for folder, marks in begun.items():
        for temporary in folder.glob(".onp-*.tmp"):
            if temporary.name.split("-")[1] in marks:
                temporary.unlink(missing_ok=True)


def _mark(target: Path) -> str:
    """What temporary files for it have in their names."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _create_temporary(path: Path) -> tuple[Path, int]:
    """An empty file in the directory that ``path`` leads to, and the mode the umask gave it."""
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".onp-{_mark(target)}-{os.urandom(6).hex()}.tmp"
    try:
        if target.is_dir():
            raise UsageError(f"cannot write {path}: it is a directory")
        if target.exists() and not target.is_file():
            raise UsageError(f"cannot write {path}: it is not a regular file")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise file_error("write", path, error) from None
    try:
        return temporary, stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """See to it that the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
