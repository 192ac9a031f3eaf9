"""onp: repair backdoored neural networks by optimized neuron pruning.

``onp.sanitize(model, clean)`` is the whole product; see README.md. Names are loaded when they are
first used, so that ``onp --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.22.0"

if TYPE_CHECKING:
    from onp.config import BUDGETS as BUDGETS
    from onp.config import Config as Config
    from onp.data import PRESETS as PRESETS
    from onp.data import ImageSet as ImageSet
    from onp.data import Preprocess as Preprocess
    from onp.data import draw_balanced as draw_balanced
    from onp.data import load_dataset as load_dataset
    from onp.evaluate import MaskEvaluator as MaskEvaluator
    from onp.graph import build_graph as build_graph
    from onp.metrics import score as score
    from onp.result import Result as Result
    from onp.sanitize import sanitize as sanitize
    from onp.suspect.trace import trace as trace

_HOME = {
    "BUDGETS": "config",
    "Config": "config",
    "PRESETS": "data",
    "ImageSet": "data",
    "Preprocess": "data",
    "draw_balanced": "data",
    "load_dataset": "data",
    "MaskEvaluator": "evaluate",
    "build_graph": "graph",
    "score": "metrics",
    "Result": "result",
    "sanitize": "sanitize",
    "trace": "suspect.trace",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onp' has no attribute {name!r}")
    value = getattr(import_module(f"onp.{_HOME[name]}"), name)
    globals()[name] = value  # also replaces the submodule of the same name (sanitize)
    return value
