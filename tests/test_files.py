"""Atomic writing: the old file or the new one, and an error that names the path."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from onp import files
from onp.errors import OnpError, ResourceError, UsageError
from onp.files import check_writable, write_atomically, write_json


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_json(target, {"a": 1})
    write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 2}
    assert _names(tmp_path) == ["report.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    def replace_itself(temporary: Path) -> None:
        other = temporary.with_suffix(".other")
        other.touch(mode=0o600)
        other.rename(temporary)

    previous = os.umask(umask)
    try:
        write_atomically(tmp_path / "out", replace_itself)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "1\n"


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
def test_failed_writer_leaves_the_old_file_alone(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "out"
    target.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(target, write)
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, ResourceError), (errno.EIO, ResourceError), (errno.EACCES, UsageError)],
)
def test_file_system_errors_name_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, kind: type[OnpError]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    target = tmp_path / "out"
    target.write_text("old")
    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(kind, match=f"cannot write .*out: {os.strerror(code)}"):
        write_json(target, 1)
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["out"]


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "out", float("nan"))
    assert _names(tmp_path) == []


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "out")
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/out", "No such file"),
        ("file/out", "Not a directory"),
        (".", "is a directory"),
        ("pipe", "not a regular file"),
        ("x" * 300, "name too long"),
    ],
)
def test_wrong_paths_are_usage_errors(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=message):
        check_writable(tmp_path / path)
    with pytest.raises(UsageError, match=message):
        write_json(tmp_path / path, 1)


def test_read_only_directory_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.os, "open", fail)
    with pytest.raises(UsageError, match=r"cannot write .*out: Permission denied"):
        check_writable(tmp_path / "out")
