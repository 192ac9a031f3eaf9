"""The ``onp::`` operator library: what torch.compile and autograd must see is registered here."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("onp", "DEF")
"""Holds every registration; it must outlive the operators."""
