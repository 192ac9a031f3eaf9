"""The constants that are fitted anew for each fold, and the values that they may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean

from onp.config import Config

CONSTANTS: dict[str, tuple[float, ...]] = {
    "success": (1.5, 2.0, 3.0),
    "choice": (2.0, 2.7, 4.0),
    "clean": (6.0, 3.0, 12.0),
    "price": (0.02, 0.01, 0.04),
}
"""Weights of the trigger's success in the search and in the choice, of clean images in the gates,
and the price of a closed gate; as shipped first."""

Setting = tuple[float, ...]
"""A value of each constant, in their order."""
SHIPPED: Setting = tuple(values[0] for values in CONSTANTS.values())


def settings() -> list[Setting]:
    """As shipped, and with one constant changed."""
    found = [SHIPPED]
    for place, values in enumerate(CONSTANTS.values()):
        for value in values[1:]:
            found.append((*SHIPPED[:place], value, *SHIPPED[place + 1 :]))
    return found


def configured(config: Config, setting: Setting) -> Config:
    success, choice, clean, price = setting
    return replace(
        config,
        cost=replace(config.cost, success_weight=success),
        choice=replace(config.choice, success_weight=choice),
        gates=replace(config.gates, clean_weight=clean, price=price),
    )


def fitted(ders: Callable[[Setting], Mapping[str, float]], kept_out: set[str]) -> Setting:
    """Each constant at the value with the best mean DER on the networks that are not kept out, the
    others as shipped; ``ders`` are a setting's, by network. Their combination is not tried."""
    best: list[float] = []
    for place, values in enumerate(CONSTANTS.values()):

        def mean(value: float, place: int = place) -> float:
            own = ders((*SHIPPED[:place], value, *SHIPPED[place + 1 :]))
            return fmean(der for name, der in own.items() if name not in kept_out)

        best.append(max(values, key=mean))
    return tuple(best)
