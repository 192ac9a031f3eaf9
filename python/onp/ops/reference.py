"""Naive twins of every native operation: obvious, slow, and importing torch alone."""

from __future__ import annotations

# ---- message passing ----------------------------------------------------------------------------

# ---- neuron graph -------------------------------------------------------------------------------

# ---- masked forward -----------------------------------------------------------------------------
