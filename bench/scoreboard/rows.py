"""One row of the scoreboard, and the JSON lines file that holds them."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from onp.errors import UsageError
from onp.files import file_error

Key = tuple[str, str, int, int, bool]
"""(model, defence, seed, clean_samples, oracle): what no two rows of a file share."""


@dataclass(frozen=True)
class Row:
    """What one defence did to one network. Rates are shares in [0, 1]; None: not defined here."""

    model: str
    dataset: str
    arch: str
    attack: str
    """``clean`` for a network without a backdoor: its ASR, RA and DER are None."""
    ratio: float | None
    """Poisoned share of the training images."""
    target: int | None
    defence: str
    seed: int
    """Of the draw of clean images and of the defence."""
    clean_samples: int
    oracle: bool = False
    """Told of the attack: the setting was picked with the true trigger (an upper bound), or the
    defence knows it or its class. Never a result."""
    oracle_images: int | None = None
    """Clean test images that an oracle row's setting was picked by, with at most as many triggered
    ones: not every image can be triggered."""

    applicable: bool = True
    reason: str | None = None
    """Why the defence does not apply."""
    error: str | None = None
    """What the defence died of."""

    ca_before: float | None = None
    ca_after: float | None = None
    asr_before: float | None = None
    asr_after: float | None = None
    asr_clean_twin: float | None = None
    """Share of the same triggered images that a clean twin answers as the attack wants."""
    ra_before: float | None = None
    ra_after: float | None = None
    excess_asr: float | None = None
    """``asr_after - asr_clean_twin``."""
    der: float | None = None
    der_ceiling: float | None = None
    """``(1 + asr_before) / 2``: ASR 0 and no accuracy lost."""
    der_shortfall: float | None = None
    """``der_ceiling - der``."""

    seconds: float | None = None
    """Wall clock of the defence alone, without scoring. With ``jobs`` above 1 other
    networks' runs shared the machine: ``cpu_seconds`` then says better what the work was."""
    cpu_seconds: float | None = None
    """User and system time of all of the process's threads during the defence."""
    image_forwards: int | None = None
    """As the defence counted: a forward 1, with input gradients 2, with weight gradients 3."""
    peak_memory_mb: float | None = None
    """Largest resident set of the whole process during the defence, in 10^6 bytes."""

    test_images: int | None = None
    triggered_images: int | None = None
    """Test images whose label is not what the attack wants: ASR and RA are shares of these."""
    test_data: str | None = None
    """Fingerprint of the clean test images; None: unknown, as in rows that were made without."""
    weights: str | None = None
    """Digest of the checkpoint that the defence was given; None: unknown."""
    schedule: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    candidates: int = 0
    """Settings that the defence chose from; where there are some, an oracle row can follow."""
    verdict: str | None = None
    pruned: int | None = None

    commit: str | None = None
    onp: str | None = None
    torch: str | None = None
    threads: int | None = None
    jobs: int = 1
    """Networks that ran side by side, at most, each with its part of the cores."""
    cpu: str | None = None

    @property
    def key(self) -> Key:
        return (self.model, self.defence, self.seed, self.clean_samples, self.oracle)

    @property
    def scored(self) -> bool:
        """The defence applied and gave a network back."""
        return self.ca_after is not None

    @property
    def clean_twin(self) -> bool:
        return self.attack == "clean"

    @property
    def ca_drop(self) -> float | None:
        """Clean accuracy lost; negative where it rose."""
        if self.ca_before is None or self.ca_after is None:
            return None
        return self.ca_before - self.ca_after


def der(asr_before: float, asr_after: float, ca_before: float, ca_after: float) -> float:
    """Defence effectiveness rating in [0, 1] (Zhu et al., FT-SAM, arXiv 2304.11823).

    ``[max(0, ASR before - after) - max(0, CA before - after) + 1] / 2``: 1/2 for doing nothing.
    Lost accuracy is subtracted; BackdoorBench's ``defense_effectiveness_rate`` adds it.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, ca_before - ca_after) + 1) / 2


def read_rows(path: Path, *, repair: bool = False) -> dict[Key, Row]:
    """Rows of the file by key, a later one in place of what it outdates; empty without a file.

    A last line that was cut off while it was written is left out, and with ``repair`` cut from the
    file, which is said on stderr. Raises UsageError naming the line for anything else unreadable.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise file_error("read", path, error) from None
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        print(f"{path}: the last line was cut off while it was written; its row is not counted",
              file=sys.stderr)  # fmt: skip
        if repair:
            os.truncate(path, whole)
    rows: dict[Key, Row] = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number}: not a row of the scoreboard: {error}"
            ) from None
        put_row(rows, row)
    return rows


def put_row(rows: dict[Key, Row], row: Row) -> None:
    """Put ``row`` in the place of the one of its key.

    The oracle picks among the candidates of one run: a later run of the defence outdates its row
    until the oracle has picked anew.
    """
    if not row.oracle:
        rows.pop(replace(row, oracle=True).key, None)
    rows[row.key] = row


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append the rows in one write that is on the disk when this returns."""
    text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())
    except OSError as error:
        raise file_error("write", path, error) from None


def plain(value: Any) -> Any:
    """``value`` as strict JSON can hold it: tensors as lists, infinities and the rest as text."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
