"""The ``onp::`` operator library: what torch.compile and autograd must see is registered here."""

from __future__ import annotations

from typing import Any

import torch

LIBRARY: Any = torch.library.Library("onp", "DEF")  # type: ignore[no-untyped-call]
"""Holds every registration; it must outlive the operators."""
