"""The folders of sandboxes: made, cleared away whatever lies in them, and those of dead runs with them."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "zeda-sandbox-"


class SandboxFolder:
    """A new folder that is gone after `remove`. Until then this process holds a lock on it, which the kernel takes
    back when the process dies: so another run can tell that nobody needs it any more."""

    def __init__(self):
        while True:
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # a file system without locks: nobody sweeps there either
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.path.isdir(self.path):
                return
            os.close(self._lock)  # somebody's `sweep` was between the two lines

    def remove(self) -> None:
        """Delete it. What cannot be deleted stays; never raises for what a program left in it."""
        remove_tree(self.path)
        os.close(self._lock)


def sweep(root: str | None = None) -> int:
    """Delete the sandbox folders in `root` (default: where they are made) whose process is dead; returns how many."""
    swept = 0
    for path in Path(root or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(str(path))
                swept += not path.exists()
            finally:
                os.close(lock)
    return swept


def remove_tree(path: str) -> None:
    """Delete a folder of any depth and modes: folders below move up beside it, so no path becomes long and nothing
    recurses. What the system refuses stays."""
    with suppress(OSError):
        os.chmod(path, 0o700)
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    pending = [""]  # folders to empty: names in the root, and the root itself
    try:
        while pending:
            name = pending.pop()
            with suppress(OSError):
                _empty(root, name, pending)
                if name:
                    os.rmdir(name, dir_fd=root)
    finally:
        os.close(root)
    with suppress(OSError):
        os.rmdir(path)


def _empty(root: int, name: str, pending: list[str]) -> None:
    """Delete the files in a folder; folders in it become `pending` ones of the root."""
    folder = os.open(name or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    try:
        for entry in os.listdir(folder):
            with suppress(OSError):
                if not stat.S_ISDIR(os.lstat(entry, dir_fd=folder).st_mode):
                    os.unlink(entry, dir_fd=folder)
                    continue
                os.chmod(entry, 0o700, dir_fd=folder)
                moved = secrets.token_hex(16)
                os.rename(entry, moved, src_dir_fd=folder, dst_dir_fd=root)
                pending.append(moved)
    finally:
        os.close(folder)
