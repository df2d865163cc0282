"""Files of a checkpoint folder that are compared with `integrity.json` when they are first needed.

Hashing everything beforehand would read every byte twice from the disk; this way a file is in memory when it is used.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

from ..checkpoint.folders import is_complete
from ..checkpoint.integrity import INTEGRITY, REMEDY, compare_file, has_integrity, told_files
from ..config.run import VERIFY_LEVELS
from ..errors import UserError


class CheckedFiles:
    """Looks at each file once; threads that need the same file wait for the one that looks.

    Args:
        folder: checkpoint folder.
        flag: the flag that named it, for messages.
        level: "hash" compares size and SHA-256, "size" the size only, "none" nothing.

    Raises:
        UserError: a file is missing or has another size, which is looked up for all of them at once.
    """

    def __init__(self, folder: Path, flag: str, level: str):
        if level not in VERIFY_LEVELS:
            raise UserError(
                f"--verify-checkpoint {level!r} is unknown; choose one of {', '.join(VERIFY_LEVELS)}"
            )
        self._folder, self._flag, self._level = folder, flag, level
        self._told: dict[str, tuple[int, str]] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock, self._seen = threading.Lock(), set()
        if level != "none" and has_integrity(folder):
            told = told_files(folder)
            if told is None:
                raise self._error(f"{INTEGRITY} cannot be read")
            self._told = told
            for name, (size, sha256) in sorted(told.items()):
                self._compare(name, size, sha256, "size")
        if not is_complete(folder):
            raise self._error("is not complete")

    def require(self, name: str) -> None:
        """Compare a file unless that was done before; a file that `integrity.json` lacks passes."""
        if self._level != "hash" or name not in self._told:
            return
        with self._lock:
            lock = self._locks[name]
        with lock:
            if name not in self._seen:
                self._compare(name, *self._told[name], "hash")
                self._seen.add(name)

    def _compare(self, name: str, size: int, sha256: str, level: str) -> None:
        damage = compare_file(self._folder / name, size, sha256, level)
        if damage:
            raise self._error(f"{name} {damage}")

    def _error(self, what: str) -> UserError:
        return UserError(f"{self._flag} {self._folder}: {what}; {REMEDY}")
