"""The journal keeps what is done, whatever happens to its last line."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from onp.batch.journal import Entry, Journal, entries_of
from onp.errors import ResourceError, UsageError

DONE = Entry(
    "a/m.pt", "m.safetensors", "s", sha256="1" * 64, verdict="backdoor", score=0.9,
    target_classes=(3,), pruned=7, accuracy_before=0.9, accuracy_after=0.8, out_sha256="2" * 64,
    report_sha256="3" * 64, seconds=1.5,
)  # fmt: skip
FAILED = Entry("b.pt", "b.safetensors", "s", error="the file is empty", exit_code=2)


def _append(path: Path, *entries: Entry) -> None:
    with closing(Journal(path)) as journal:
        for entry in entries:
            journal.append(entry)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_what_is_written_is_read(path: Path) -> None:
    _append(path)
    assert entries_of(path) == []
    _append(path, DONE, FAILED)
    assert entries_of(path) == [DONE, FAILED]
    assert [entry.failed for entry in entries_of(path)] == [False, True]


@pytest.mark.parametrize("length", [1, 40, -1])
def test_a_line_that_was_cut_off_is_no_entry_and_spoils_no_other(length: int, path: Path) -> None:
    _append(path, DONE, FAILED)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:first] + whole[first:][:length])
    kept = [DONE, FAILED] if length == -1 else [DONE]  # without its end a line is whole
    assert entries_of(path) == kept
    _append(path, FAILED)
    assert entries_of(path) == [*kept, FAILED]


@pytest.mark.parametrize(
    "line", ["[]", "null", "{}", '{"schema": "onp.batch/0", "model": "a"}', "\xff",
             '{"schema": "onp.batch/1", "model": "a"}']
)  # fmt: skip
def test_lines_of_another_kind_are_none(line: str, path: Path) -> None:
    path.write_bytes(line.encode("latin-1") + b"\n")
    _append(path, DONE)
    assert entries_of(path) == [DONE]


def test_fields_that_are_not_known_are_left_out(path: Path) -> None:
    _append(path, DONE)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"news": 1}) + "\n")
    assert entries_of(path) == [DONE]


def test_one_batch_at_a_time(path: Path) -> None:
    with closing(Journal(path)), pytest.raises(UsageError, match="another batch is writing"):
        Journal(path)
    _append(path, DONE)
    assert entries_of(path) == [DONE]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*nowhere/journal"):
        Journal(tmp_path / "nowhere" / "journal.jsonl")
    with pytest.raises(UsageError, match="cannot read"):
        entries_of(tmp_path)


def test_a_full_disk_is_told(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    journal._file = open("/dev/full", "ab+", buffering=0)  # noqa: SIM115
    with closing(journal), pytest.raises(ResourceError, match="No space left"):
        journal.append(DONE)
