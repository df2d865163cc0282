"""What the person who watches sees on stderr: lines, and a bar that says how far long work is. Rank 0 alone speaks."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from .agreement import rank

LOG_SECONDS = 30.0
"""Where stderr is no terminal a bar is a line as often as this, and none before: no line for what is over sooner."""


def told(text: str) -> None:
    """A line for the person who watches, once."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def warn(text: str) -> None:
    """A line about something that is not as it should be; the run goes on."""
    told(f"warning: {text}")


def ending(what: str, then: str = "") -> str:
    """How a command ends: what it wrote, and what to type next."""
    return f"{what}; next: {then}" if then else what


def progress_bar(
    total: int | None, unit: str, title: str | None = None, shown: bool = True, **how: Any
) -> tqdm:
    """A bar with the time left, to be closed or used by `with`.

    Args:
        total: None where it is known later.
        shown: what `--no-progress` turns off.
        how: more of tqdm's arguments, such as `initial`.
    """
    if sys.stderr.isatty():
        how |= {"file": sys.stderr, "mininterval": 0.5, "dynamic_ncols": True}
    else:
        how |= {
            "file": _Lines(),
            "mininterval": LOG_SECONDS,
            "maxinterval": LOG_SECONDS,
            "delay": LOG_SECONDS,
        }
    return tqdm(total=total, unit=unit, desc=title, disable=not shown or rank() != 0, **how)


class _Lines:
    """stderr, where every state of a bar is a line of its own: in a file nothing is written over."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
