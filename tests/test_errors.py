"""What is told of an error."""

from __future__ import annotations

import pytest

from onp.errors import BadData, NotBuiltError, ResourceError, explained


def _led_to(error: Exception, cause: BaseException) -> Exception:
    try:
        try:
            raise cause
        except type(cause):
            raise error from None
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "message", "code", "foreseen", "ran_out"),
    [
        (BadData("two\n lines"), "two lines", 2, True, False),
        (ResourceError("disk full"), "disk full", 5, True, True),
        (NotBuiltError("no CUDA"), "no CUDA", 5, True, False),
        (KeyError("x"), "internal: KeyError: 'x'", 2, False, False),
        (MemoryError(), "memory ran out; try fewer clean samples", 5, True, True),
        (
            RuntimeError("CUDA out of memory."),
            "memory ran out; try fewer clean samples",
            5,
            True,
            True,
        ),
        (
            _led_to(BadData("damaged"), MemoryError()),
            "memory ran out; try fewer clean samples",
            5,
            True,
            True,
        ),
        (_led_to(BadData("damaged"), ValueError()), "damaged", 2, True, False),
        (BadData("they say: out of memory"), "they say: out of memory", 2, True, False),
    ],
    ids=str,
)
def test_every_error_is_explained(
    error: Exception, message: str, code: int, foreseen: bool, ran_out: bool
) -> None:
    told = explained(error)
    assert (told.message, told.exit_code) == (message, code)
    assert (told.foreseen, told.ran_out) == (foreseen, ran_out)
