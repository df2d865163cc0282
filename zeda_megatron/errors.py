"""Errors that a user can cause: one clear line, no traceback. What a message shows is cut to size here."""

from __future__ import annotations

import re
import reprlib
from importlib import import_module
from types import ModuleType
from typing import Any

VALUE_WIDTH, LINE_WIDTH = 60, 1000
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 2, 3, 4, 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = VALUE_WIDTH


class UserError(Exception):
    """A mistake in input, flags or files. The message names the thing at fault and what to do.

    It becomes one printable line, at most `LINE_WIDTH` characters long, whatever was put into it.
    """

    exit_code = 2
    """Exit code of a program that ends with it."""

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


def shown(value: Any) -> str:
    """A value as a message shows it: its repr, cut to `VALUE_WIDTH` characters; large collections are never walked."""
    try:
        return _middle_out(_SHORT.repr(value), VALUE_WIDTH)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"{type(value).__name__} that is too large to show"


def cut_short(text: str, longest: int = VALUE_WIDTH) -> str:
    """A text as messages repeat it: its beginning, however long it is."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def one_line(text: str) -> str:
    """Text as one line: line ends become spaces, what a terminal would obey or cannot show becomes an escape."""
    text = re.sub(r"\s*[\r\n]\s*", " ", _middle_out(text.strip(), LINE_WIDTH))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _middle_out(text: str, width: int) -> str:
    """The text without its middle if it is too long: messages end with what to do."""
    return text if len(text) <= width else f"{text[: width - width // 3 - 5]} ... {text[-(width // 3) :]}"


def library(module: str) -> ModuleType:
    """The module. Raises `UserError` that says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module.partition('.')[0]} cannot be imported ({error}): pip install -e '.[evaluation]'"
        ) from error
