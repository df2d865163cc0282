"""A folder appears whole or not at all: conversions, quantised models and fits are made beside their place.

Beside the target lives TARGET.partial while it is made:

    owner.json     who is at it, or was
    request.json   what is being made out of what; only the same request goes on from here
    lock           held by the process at work (released by the system when it dies)
    notes/         size, hash and facts of each finished file (`convert.file_writer`)
    work/          takes the target's name in the end (`Swap`)

`staged_folder` is for one process, which may be killed and goes on; `new_folder` for all processes of a run,
which start again with an empty .TARGET.partial.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable_file import rename_durably, sync, sync_all, write_atomically, writing
from ..errors import UserError
from .agreement import barrier, on_rank0, rank

# A folder is only ever replaced when it holds one of these: what our own commands write.
OUR_MARKS = (
    "zeda.json",
    "latest_checkpointed_iteration.txt",
    "model.safetensors",
    "model.safetensors.index.json",
)


class Kept(UserError):
    """An error that is not the input's: work that is half done stays, so that the same command can go on."""


def check_target(target: Path, overwrite: bool = False, error: type[UserError] = UserError) -> None:
    """Refuse a target that would destroy something.

    Raises:
        error: `target` exists and is not empty (without `overwrite`), or is no checkpoint folder.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise error(f"{target}: exists and is not a folder; choose another --out")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise error(f"{target}: folder is not empty; choose another --out or pass --overwrite")
    if not any((target / mark).exists() for mark in OUR_MARKS):
        raise error(f"{target}: holds no checkpoint, --overwrite will not delete it; choose another --out")


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold. Raises `Kept` naming the folder, and both sizes in bytes."""
    folder = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Kept(
            f"--out {target}: needs {needed} bytes more ({needed / 1e9:.2f} GB), but {folder} has {free} free "
            f"({free / 1e9:.2f} GB); free some space or choose another --out"
        )


class Swap:
    """How a finished folder takes the target's name, whose former holder goes: in single steps, after each of which the
    same call can go on.

    TARGET.ready-KEY is the finished folder, TARGET.old-KEY what had the name before. That names carry the key tells
    who may go on: another command with another key has made something else.

    Args:
        key: of what is made, the same when it is made again; one for all where nothing half done is gone on with.
    """

    def __init__(self, target: Path, key: str):
        self.target = target
        self.ready = target.with_name(f"{target.name}.ready-{key}")
        self.old = target.with_name(f"{target.name}.old-{key}")

    def go_on(self) -> bool:
        """Finish what an earlier call has begun. True if the target is there then."""
        if self.ready.is_dir():
            self.finish()
            return True
        if not self.old.is_dir():
            return False
        if self.target.exists():
            shutil.rmtree(self.old)
            return True
        os.rename(self.old, self.target)  # somebody has removed the new one
        return False

    def begin(self, finished: Path) -> None:
        """The folder is whole; from here on nothing has to be made again."""
        sync_all(finished)
        os.rename(finished, self.ready)
        sync(self.target.parent)

    def finish(self) -> None:
        """Names, then what had the name before."""
        if self.target.exists() and not self.old.exists():
            os.rename(self.target, self.old)
        rename_durably(self.ready, self.target)  # if not, the next call does it again
        if self.old.exists():
            shutil.rmtree(self.old)


@dataclass(frozen=True)
class Staging:
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
def staged_folder(
    target: str | os.PathLike, request: dict[str, Any], overwrite: bool = False, restart: bool = False
) -> Iterator[Staging | None]:
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
    staging = Staging(target.parent / f"{target.name}.partial")
    swap = Swap(target, hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12])
    try:
        if not restart and swap.go_on():
            _remove(staging.root)
            yield None
            return
        with _locked(staging.root):
            _prepare(staging, request, restart)
            try:
                yield staging
                check_target(target, overwrite, Kept)  # somebody else may have written there meanwhile
                swap.begin(staging.work)
            except BaseException as error:
                if not staging.has_progress() or (
                    isinstance(error, UserError) and not isinstance(error, Kept)
                ):
                    with contextlib.suppress(OSError):
                        _remove(staging.root)
                raise
            _remove(staging.root)
        swap.finish()
    except OSError as error:
        kept = staging.has_progress()
        more = f"; what is done stays in {staging.root}, the same command goes on from there" if kept else ""
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


def _prepare(staging: Staging, request: dict[str, Any], restart: bool) -> None:
    file = staging.root / "request.json"
    if not restart and staging.has_progress():
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
                f"{staging.root}: holds an unfinished conversion with other {', '.join(names)}; repeat that "
                "command to go on, or pass --restart to throw it away"
            )
        restart = earlier is None
    if restart or not staging.has_progress():
        for folder in (staging.work, staging.notes):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (staging.work, staging.notes):
        folder.mkdir(exist_ok=True)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_atomically(staging.root / "owner.json", json.dumps(owner) + "\n")
    write_atomically(file, json.dumps(request, indent=1) + "\n")


def files_of(paths: list[Path]) -> list[list[Any]]:
    """Name, size and time of files: what tells that a source is the same as before. Missing files are left out."""
    told = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            told.append([path.name, status.st_size, status.st_mtime_ns])
    return told


@contextmanager
def new_folder(path: str | Path, flag: str) -> Iterator[Path]:
    """`with new_folder(path, "--save") as staging: ...` fills a folder beside `path`, then puts it in its place.

    All processes enter; rank 0 makes and moves folders. What stood at `path` goes when its successor is whole;
    after an exception the staging folder goes instead. Raises `UserError` on all ranks if a folder cannot be made or
    moved.
    """
    path = Path(os.path.abspath(path))
    staging, swap = path.with_name(f".{path.name}.partial"), Swap(path, "new")

    def make() -> None:
        swap.go_on()
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)

    def put_in_place() -> None:
        swap.begin(staging)
        swap.finish()

    try:
        _told(make, flag, path)
        yield staging
        barrier()
        _told(put_in_place, flag, path)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _told(do: Callable[[], None], flag: str, path: Path) -> None:
    with writing(f"{flag} {path}"):
        on_rank0(do)
