"""JSON from files that nobody has checked: no doubled keys, no NaN, nothing but UTF-8."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import UserError

MAX_BYTES = 100_000_000
"""Longest JSON text that is read; the same limit that safetensors has for headers."""


def strict_loads(data: bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: no UTF-8, no JSON, nested too deeply, a key that comes twice, or a number that is not finite. The
            message names the key.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        place = _not_finite(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if place is not None:
        raise ValueError(f"{place} is not a finite number")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that holds a JSON object, or raise a `UserError` that names the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is longer than {MAX_BYTES} bytes, which no such file is")
        value = strict_loads(path.read_bytes())
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
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} comes twice")
    return result


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
