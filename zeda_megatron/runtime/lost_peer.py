"""A collective that cannot end because another process is gone or hangs: one line instead of gloo's.

NCCL does not come here when a rank hangs: its watchdog ends the process with a report of its own.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from ..errors import UserError

_GLOO = re.compile(r"gloo|pair closure", re.IGNORECASE)
_GONE = re.compile(r"closed by peer|reset by peer|connection (was )?(closed|refused|reset)|broken pipe", re.I)
_WAITED = re.compile(r"timed? ?out(?: after)?(?: waiting)?(?: (?P<ms>\d+) ?ms)?", re.I)
_TORCH = ("DistBackendError", "DistNetworkError", "DistStoreError")
_PACKAGE = Path(__file__).parents[1]


class LostPeer(UserError):
    """Another process of this run does not answer."""

    exit_code = 3
    patience = 3.0
    """All ranks that still live meet this at about the same time, and rank 0 may be the one that does not."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` is the word of a communication library about a process that does not answer."""
    text = str(error)
    speaks = type(error).__name__ in _TORCH or (isinstance(error, RuntimeError) and _GLOO.search(text))
    return bool(speaks and (_GONE.search(text) or _WAITED.search(text)))


def lost_peer(error: BaseException) -> LostPeer | None:
    """`error` in one line, or None if it is about something else."""
    if not is_lost_peer(error):
        return None
    waited = None if _GONE.search(str(error)) else _WAITED.search(str(error))
    again = "start the same command again to go on from the last checkpoint"
    if waited is None:
        return LostPeer(
            f"{_where(error)}: another process of this run is gone, ended or killed; its own message or the "
            f"launcher's report says why. Then {again}"
        )
    limit = f" {int(waited['ms']) / 60000:g}" if waited["ms"] else ""
    return LostPeer(
        f"{_where(error)}: another process did not answer within --distributed-timeout-minutes{limit}: it hangs or "
        f"is too slow. See what it does (py-spy dump --pid PID), then {again}; if it was only slow, raise that limit"
    )


def _where(error: BaseException) -> str:
    """The collective and the place in our code that called it."""
    call, place = "a collective", ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.name == "distributed_c10d.py":
            call = frame.name
        elif file.is_relative_to(_PACKAGE) and file.parent != Path(__file__).parent:
            place = f" in {file.relative_to(_PACKAGE)} ({frame.name})"
    return call + place
