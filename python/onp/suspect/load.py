"""A checkpoint and the name of its network -> a network ready to be examined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from onp.errors import UsageError
from onp.suspect import architectures
from onp.suspect.files import SuspectFile, read_weights
from onp.suspect.matching import load_by_name
from onp.trusted import import_callable, is_code_spec


@dataclass(frozen=True)
class Suspect:
    """A network that may carry a backdoor, and where it came from."""

    model: nn.Module
    """float32, on the CPU, in eval mode."""
    arch: str
    file: SuspectFile


def load_suspect(source: str | Path, arch: str | None = None, trust: bool = False) -> Suspect:
    """Load the weights in ``source`` into the network ``arch``.

    ``arch`` is one of ``architectures.NAMES`` (width, depth and classes are read from the weights),
    or ``package.module:factory``, a function that returns the network, with arguments where it
    needs some (``torchvision.models:efficientnet_b3(num_classes=10)``); its code runs, so it needs
    ``trust``. Raises UsageError for a wrong path or ``arch``, and UnsafeOrCorruptModel for weights
    that are unsafe, damaged or not of that network.
    """
    arch, factory = checked_arch(arch, trust)
    file = read_weights(source)
    if factory is None:
        return Suspect(architectures.build(arch, file.state_dict), arch, file)
    try:
        model = factory()
    except Exception as error:
        raise UsageError(f"--arch {arch} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--arch {arch} must return a torch.nn.Module, got {type(model).__name__}")
    load_by_name(model, file.state_dict)
    return Suspect(model.float().eval(), arch, file)


def checked_arch(arch: str | None, trust: bool) -> tuple[str, Callable[..., Any] | None]:
    """The kind of network, and its factory if it is not a known name. Raises UsageError where it is
    missing or unknown, or code that is not trusted or not there."""
    if arch is None:
        raise UsageError(
            f"--arch is missing: one of {', '.join(architectures.NAMES)}, or "
            "package.module:factory, such as torchvision.models:efficientnet_b3(num_classes=10)"
        )
    if is_code_spec(arch):
        return arch, import_callable(arch, "--arch", trust)
    architectures.check_name(arch)
    return arch, None
