"""Whose weights a function takes."""

from __future__ import annotations

from types import UnionType

from torch import fx, nn

from .walk import Walk, argument_of, refuse


def owner_of(
    walk: Walk, node: fx.Node, tensors: dict[str, int], kinds: type | UnionType
) -> tuple[str, nn.Module] | None:
    """The module, of one of ``kinds``, whose own tensors a function takes; None if it takes none.
    tensors: their names and the positions of the arguments."""
    views = {
        key: walk.view(node, argument)
        for key, position in tensors.items()
        if (argument := argument_of(node, position, key)) is not None
    }
    names = {key: str(view.source) for key, view in views.items()}
    if not names:
        return None
    owner = next(iter(names.values())).rpartition(".")[0]
    module = walk.model.get_submodule(owner)
    own = {key: f"{owner}.{key}" for key in tensors if getattr(module, key, None) is not None}
    moved = any(view.moved is not None for view in views.values())
    if not isinstance(module, kinds) or own != names or moved:
        refuse(
            node,
            f"must take the tensors of one module as they are, got {', '.join(names.values())}",
        )
    return owner, module
