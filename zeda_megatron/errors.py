"""Errors that a user can cause: one clear line, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in input, flags or files. The message names the thing at fault and what to do."""

    exit_code = 2
    """Exit code of a program that ends with it."""

    def __str__(self) -> str:
        """One line, whatever names and values it repeats: file names and tensors' names may hold anything."""
        return one_line(super().__str__())


def one_line(text: str, longest: int = 1500) -> str:
    """`text` with escapes in place of line breaks and control characters, its middle cut out if it is very long."""
    if len(text) > longest:
        text = f"{text[: longest - 300]} ... {text[-300:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cut_short(text: str, longest: int = 60) -> str:
    """A value as messages repeat it: cut, however long it is."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


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
