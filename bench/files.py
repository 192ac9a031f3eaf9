"""Names of result files."""

from __future__ import annotations

import re


def slug(name: str) -> str:
    """A GPU's name as part of a file's: lower case, ``h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ")).strip("_")
