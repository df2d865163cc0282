"""A folder that appears complete or not at all, and whose making can go on after it was interrupted.

Beside the target lives TARGET.partial while it is made:

    owner.json     who is at it, or was
    request.json   what is being made out of what; only the same request goes on from here
    lock           held by the process at work (released by the system when it dies)
    notes/         size, hash and facts of each finished file (`parts`)
    work/          takes the target's name in the end (`target.Swap`)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable_file import write_atomically
from ..errors import UserError
from .target import Kept, Swap, check_target


@dataclass(frozen=True)
class Partial:
    """The inside of a `.partial` folder."""

    root: Path
    """TARGET.partial."""

    @property
    def work(self) -> Path:
        """What will be the target."""
        return self.root / "work"

    @property
    def notes(self) -> Path:
        """Notes of finished files."""
        return self.root / "notes"

    def has_progress(self) -> bool:
        """Whether a later run would find something done."""
        return self.notes.is_dir() and any(self.notes.iterdir())


@contextmanager
def partial_folder(
    target: str | os.PathLike, request: dict[str, Any], overwrite: bool = False, restart: bool = False
) -> Iterator[Partial | None]:
    """Give the folder to work in; its `work` takes the target's name when the block ends without an error. None: the
    same call was stopped when all was made, and the target is there now.

    A `UserError` removes it (the input is to blame). Whatever else stops the work (a kill, Ctrl-C, a full disk) leaves
    finished files there, and the same call goes on from them.

    Args:
        request: what is made, as JSON; names sources with their sizes and times.
        overwrite: a checkpoint at `target` is replaced.
        restart: what an earlier run has left is thrown away.

    Raises:
        UserError: see `check_target`; another process is at work there; another request is half done there.
    """
    target = Path(target).absolute()
    check_target(target, overwrite)
    partial = Partial(target.parent / f"{target.name}.partial")
    swap = Swap(target, hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12])
    try:
        if not restart and swap.go_on():
            _remove(partial.root)
            yield None
            return
        with _locked(partial.root):
            _prepare(partial, request, restart)
            try:
                yield partial
                check_target(target, overwrite, Kept)  # somebody else may have written there meanwhile
                swap.begin(partial.work)
            except BaseException as error:
                if not partial.has_progress() or (
                    isinstance(error, UserError) and not isinstance(error, Kept)
                ):
                    with contextlib.suppress(OSError):
                        _remove(partial.root)
                raise
            _remove(partial.root)
        swap.finish()
    except OSError as error:
        kept = partial.has_progress()
        more = f"; what is done stays in {partial.root}, the same command goes on from there" if kept else ""
        raise UserError(f"{error.filename or target}: {error.strerror or error}{more}") from error


def _remove(root: Path) -> None:
    """Remove a `.partial` folder, the lock last: without it nobody could tell that it is one."""
    if root.is_dir():
        for child in root.iterdir():
            if child.name != "lock":
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        shutil.rmtree(root)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise UserError(f"{root}: is in the way; remove it or choose another --out")
    if root.is_dir() and any(root.iterdir()) and not (root / "lock").is_file():
        raise UserError(f"{root}: was not made by a conversion; remove it or choose another --out")
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / "lock").open("a")
    except OSError as error:
        raise UserError(f"{root}: cannot create this folder ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{root}: {_owner(root)} is at work there; wait for it or end it") from None
            # Some network file systems have no locks; then the owner's note must do.
        if not (root / "lock").exists():
            raise UserError(f"{root}: another process has just finished there; look at its result first")
        yield


def _owner(root: Path) -> str:
    try:
        owner = json.loads((root / "owner.json").read_text())
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _prepare(partial: Partial, request: dict[str, Any], restart: bool) -> None:
    file = partial.root / "request.json"
    if not restart and partial.has_progress():
        try:
            earlier = json.loads(file.read_text())
        except (OSError, ValueError):
            earlier = None
        # JSON has no tuples: compare what a file would say.
        if earlier is not None and earlier != json.loads(json.dumps(request)):
            names = [
                key for key in request if not isinstance(earlier, dict) or earlier.get(key) != request[key]
            ]
            raise Kept(
                f"{partial.root}: holds an unfinished conversion with other {', '.join(names)}; repeat that "
                "command to go on, or pass --restart to throw it away"
            )
        restart = earlier is None
    if restart or not partial.has_progress():
        for folder in (partial.work, partial.notes):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (partial.work, partial.notes):
        folder.mkdir(exist_ok=True)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_atomically(partial.root / "owner.json", json.dumps(owner) + "\n")
    write_atomically(file, json.dumps(request, indent=1) + "\n")


def files_of(paths: list[Path]) -> list[list[Any]]:
    """Name, size and time of files: what tells that a source is the same as before. Missing files are left out."""
    told = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            told.append([path.name, status.st_size, status.st_mtime_ns])
    return told
