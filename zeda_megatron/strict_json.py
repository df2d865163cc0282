"""JSON from files that nobody has checked: no doubled keys, no NaN, nothing but UTF-8, in bounded time and memory."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .errors import UserError
from .regular_file import MAX_BYTES, read_regular

__all__ = ["MAX_BYTES", "is_int", "is_number", "read_json", "strict_loads"]
MAX_PARTS = 4_000_000
"""Most commas and opening brackets between the texts in it: the index of a model with 400,000 tensors has fewer. Python
needs up to 100 bytes for each."""
MAX_DIGITS = 1000
"""Longest whole number."""
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a character that UTF-16 writes in two."""


def strict_loads(data: bytes, finite: bool = True) -> Any:
    """Parse JSON text.

    Args:
        finite: False lets NaN and infinities pass, which Python's own writer makes.

    Raises:
        ValueError: no UTF-8, no JSON, nested too deeply, of too many parts, a key that comes twice, a number that is
            not finite or has too many digits, or half a character. The message names the key.
    """
    parts = _parts(data)
    if parts > MAX_PARTS:  # perhaps a text of commas
        parts = _parts(_STRING.sub(b"", data))
    if parts > MAX_PARTS:
        raise ValueError(f"it has {parts} parts, more than any such file")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_int)
        place = _not_finite(value) if finite else None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if place is not None:
        raise ValueError(f"{place} is not a finite number")
    if _HALF.search(data):
        _refuse_halves(value)
    return value


def _parts(data: bytes) -> int:
    return sum(map(data.count, (b",", b"[", b"{")))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that holds a JSON object, or raise a `UserError` that names the file."""
    try:
        value = strict_loads(read_regular(path))
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def is_int(value: Any) -> bool:
    """A whole number; JSON's `true` and `false` are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite number that is no boolean."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} comes twice")
    return result


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse_halves(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!r} is half a character (a lone surrogate)") from None


def _not_finite(value: Any, name: str = "the value") -> str | None:
    """The key of the first NaN or infinity."""
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    if isinstance(value, dict):
        found = (_not_finite(item, key) for key, item in value.items())
    elif isinstance(value, list):
        found = (_not_finite(item, name) for item in value)
    else:
        return None
    return next((place for place in found if place is not None), None)
