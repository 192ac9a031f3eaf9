"""The ``onp`` command: runs the command line and turns every ending into an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import cast

import typer

from onp.cli import app
from onp.errors import UsageError, explained
from onp.report.streams import flush_stdout, tell

# typer carries click inside or beside it, depending on its version: ask it for the class.
_ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run ``onp`` with ``arguments`` (default: the process's own) and return the exit code.

    0 done, 1 a finding named by --fail-on, 2 could not process, 3 no supported input, 4 wrong
    usage, 5 a resource ran out, 130 interrupted. Errors are one line on stderr; only an error
    that onp did not foresee shows its traceback.
    """
    try:
        code = app(arguments, standalone_mode=False)
        if code == _INTERRUPTED:  # some versions of typer turn KeyboardInterrupt into this
            raise KeyboardInterrupt
        flush_stdout()
        return code if isinstance(code, int) else 0
    except _ClickException as error:
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return _fail(f"{message} (see onp --help)", UsageError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:
        told = explained(error)
        if not told.foreseen:
            traceback.print_exc()
        return _fail(told.message, told.exit_code)


def _fail(message: str, code: int) -> int:
    tell(f"onp: error: {' '.join(message.split())}")
    return code


if __name__ == "__main__":
    sys.exit(main())
