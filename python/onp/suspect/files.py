"""Untrusted bytes -> weights, safely; and repaired weights -> bytes.

A checkpoint may be a program. ``read_weights`` is the only door: it reads the file once, decides by
content (never by suffix) what it is, and never unpickles anything but tensors, plain containers and
the numbers and arrays of numpy that benchmarks save beside them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from onp.errors import OnpError, UnsafeOrCorruptModel, UnsupportedInput, UsageError, quoted
from onp.files import file_error, write_atomically
from onp.suspect.state_dict import MAX_TENSORS, flat_state_dict

MAX_BYTES = 4 << 30
"""Largest file read, and largest sum of its tensors, unless the caller says otherwise."""

_MAX_HEADER = 16 << 20
"""Largest safetensors header in bytes: ``MAX_TENSORS`` entries with long names fit."""

_NUMBERS = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64",
)  # fmt: skip


def _numpy_data() -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    """What arrays and scalars of numbers are unpickled by, under the names of numpy 1 and 2; none
    of objects."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    named = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    return [*named, np.ndarray, np.dtype, *(type(np.dtype(name)) for name in _NUMBERS)]


_ZIP_START = b"PK\x03\x04"
_LISTED = 8


@dataclass(frozen=True)
class SuspectFile:
    """The weights of one file, and what is needed to name that file again."""

    path: Path
    sha256: str
    """Of the bytes that were parsed."""
    loader: str
    """``safetensors``, ``torch-zip`` or ``torch-legacy``."""
    state_dict: dict[str, Tensor]
    """Flat, contiguous, on the CPU, in the file's dtypes; wrappers' prefixes are stripped."""


def read_weights(path: str | Path, max_bytes: int = MAX_BYTES) -> SuspectFile:
    """Read the state dict in ``path``: safetensors, or a torch.save file of either format.

    Raises UsageError if ``path`` cannot be opened as a file, UnsupportedInput if its content is of
    no kind read here, UnsafeOrCorruptModel for everything wrong with the content, ResourceError if
    reading fails. No other exception leaves, whatever the bytes.
    """
    path = Path(path)
    data, digest = _read_once(path, max_bytes)
    loader, parse = _sniff(data, path)
    try:
        state_dict = flat_state_dict(parse(data), max_bytes)
    except OnpError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # parsers of hostile bytes raise anything
        raise UnsafeOrCorruptModel(
            f"{path}: damaged {loader} file: {quoted(f'{type(error).__name__}: {error}', 200)}"
        ) from error
    return SuspectFile(path, digest, loader, state_dict)


def sha256_of(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The sha256 that ``read_weights`` would tell of ``path``, without parsing it. Raises what that
    raises for what is no file, cannot be read, or is too large or empty."""
    return _read_once(Path(path), max_bytes)[1]


def save_weights(
    path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``state_dict`` as safetensors, atomically, with ``metadata`` in its header.

    Tensors that share memory are written once for each name.
    """
    tensors = {key: _copied(tensor) for key, tensor in state_dict.items()}
    data = _in_order(format_safetensors(tensors, dict(metadata or {})))

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(Path(path), write)


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in another order every
    time, and the same repair shall give the same bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _read_once(path: Path, max_bytes: int) -> tuple[bytes, str]:
    """The bytes of the regular file ``path`` and their sha256."""
    try:
        # Non-blocking, so that a named pipe is refused below instead of waited for.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"cannot read {quoted(path)}: {error}") from None
    except OSError as error:
        raise file_error("read", path, error) from None
    try:
        facts = os.fstat(handle)
        if stat.S_ISDIR(facts.st_mode):
            raise UsageError(f"cannot read {path}: it is a directory")
        if not stat.S_ISREG(facts.st_mode):
            raise UsageError(f"cannot read {path}: it is not a regular file")
        if facts.st_size > max_bytes:
            raise UnsafeOrCorruptModel(
                f"{path}: {facts.st_size} bytes are more than the limit of {max_bytes}"
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(facts.st_size)  # what is appended meanwhile stays unread
    except OSError as error:
        raise file_error("read", path, error) from None
    finally:
        os.close(handle)
    if not data:
        raise UnsafeOrCorruptModel(f"{path}: the file is empty")
    return data, hashlib.sha256(data).hexdigest()


def _sniff(data: bytes, path: Path) -> tuple[str, Callable[[bytes], object]]:
    """The loader's name and its function, by the first bytes."""
    if data[:4] == _ZIP_START:
        return "torch-zip", _parse_zip
    if data[8:9] == b"{":  # before pickles: a header's length may look like a pickle's start
        return "safetensors", _parse_safetensors
    if data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "torch-legacy", _parse_pickle
    raise UnsupportedInput(f"{path}: neither safetensors nor a torch.save file")


def _parse_safetensors(data: bytes) -> object:
    header = int.from_bytes(data[:8], "little")
    if header > min(_MAX_HEADER, len(data) - 8):
        raise UnsafeOrCorruptModel(f"damaged safetensors file: a header of {header} bytes")
    return parse_safetensors(data)


def _parse_zip(data: bytes) -> object:
    _check_archive(data)
    return _parse_pickle(data)


def _check_archive(data: bytes) -> None:
    """Refuse what torch.save never writes: compression, doubled or outside names, overlaps."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        names = {member.filename for member in members}
        if len(members) > MAX_TENSORS:
            raise UnsafeOrCorruptModel(f"{len(members)} members are more than {MAX_TENSORS}")
        if len(names) != len(members):
            raise UnsafeOrCorruptModel("two members of the archive have the same name")
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            raise UnsafeOrCorruptModel(
                "a TorchScript file is a program; save the network's state_dict() instead"
            )
        for member in members:
            _check_member(member)
        if sum(member.file_size for member in members) > len(data):
            raise UnsafeOrCorruptModel("members of the archive overlap")
        damaged = archive.testzip()  # also compares each local name with the directory's
        if damaged is not None:
            raise UnsafeOrCorruptModel(f"member {quoted(damaged)} is damaged (CRC-32 differs)")


def _check_member(member: zipfile.ZipInfo) -> None:
    stored = member.compress_type == zipfile.ZIP_STORED and member.flag_bits & 0x1 == 0
    if not stored or member.compress_size != member.file_size:
        raise UnsafeOrCorruptModel(
            f"member {quoted(member.filename)} is compressed or encrypted; torch.save stores it"
        )
    parts = member.orig_filename.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or "\0" in member.orig_filename:
        raise UnsafeOrCorruptModel(f"member {quoted(member.orig_filename)} points outside")


def _parse_pickle(data: bytes) -> object:
    with torch.serialization.safe_globals(_numpy_data()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old storage types; the caller cannot act on it
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            wanted = _refused_globals(data, error)
            reason = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
            if not wanted and reason:  # torch's own text advises to load it unsafely: not shown
                raise UnsafeOrCorruptModel(
                    f"refused, its pickle is not one of plain tensors ({quoted(reason.group(1))}); "
                    "save the network's state_dict() instead"
                ) from None
            if not wanted:
                raise
            more = f" and {len(wanted) - _LISTED} more" if len(wanted) > _LISTED else ""
            names = ", ".join(quoted(name) for name in wanted[:_LISTED])
            raise UnsafeOrCorruptModel(
                f"refused, loading it would run code of the file's choice: it wants {names}{more}; "
                "save the network's state_dict() instead"
            ) from None


def _refused_globals(data: bytes, error: Exception) -> list[str]:
    """Names of the functions and classes that an unsafe pickle asks for; nothing is loaded."""
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # not a zip, or too damaged to list
        wanted = []
    named = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    return sorted(wanted) or ([named.group(1)] if named else [])
