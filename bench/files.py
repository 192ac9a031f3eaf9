"""Result files: their names, and rows as JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def slug(name: str) -> str:
    """A GPU's name as part of a file's: lower case, ``h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ")).strip("_")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file, so that a command that is stopped can go on from there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
