"""Errors that a user can cause: one clear line, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in input, flags or files. The message names the thing at fault and what to do."""

    exit_code = 2
    """Exit code of a program that ends with it."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit: 0 when fine, 2 with one line on stderr for a `UserError`.

    `--debug` on the command line (or ZEDA_DEBUG=1) lets the traceback through.
    """
    try:
        code = main()
    except UserError as error:
        if "--debug" in sys.argv or os.environ.get("ZEDA_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    sys.exit(code or 0)
