"""Files that nobody has checked: only regular ones are opened, and no more of them is read than makes sense."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

MAX_BYTES = 100_000_000
"""Longest file that is read whole; the same limit that safetensors has for headers."""
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading bytes. Anybody else's folder may hold a pipe, which would never open, or a device.

    Raises:
        UserError: it is no regular file.
        OSError: as `open` does; `FileNotFoundError` above all.
    """
    try:
        require_regular(path)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a null character
        raise UserError(f"{path}: is no name of a file") from None
    return os.fdopen(handle, "rb")


def require_regular(path: str | os.PathLike) -> os.stat_result:
    """What the system tells of a regular file. Raises as `open_regular` does."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something else")
        raise UserError(f"{path}: is {kind}, where a regular file belongs")
    return status


def read_regular(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """The content of a file. Raises as `open_regular` does, and `UserError` if it has more than `limit` bytes."""
    with open_regular(path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: is longer than {limit} bytes, which no such file is")
    return data


def is_regular(path: Path) -> bool:
    """Whether a regular file is there; False for nothing at all.

    Raises:
        UserError: there is something else of that name: a file that is there must not be overlooked.
    """
    try:
        require_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return True


def refuse_odd_files(folder: Path) -> None:
    """Raise a `UserError` for a pipe, a socket or a device in a folder; a link to nowhere is no file."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            is_regular(path)
