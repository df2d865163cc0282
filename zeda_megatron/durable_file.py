"""Files that a kill, a power cut or a full disk cannot leave half written, and folders whose names are kept."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def writing(what: object) -> Iterator[None]:
    """`with writing(f"--out {path}"):` makes the system's refusal to write one line, a `UserError` that begins so."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror or error})") from error


def write_atomically(path: Path, text: str) -> None:
    """Write, flush to disk, rename: the file has the old or the new content, never a part. One writer at a time."""
    with _beside(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_result(flag: str, path: str | Path, text: str) -> None:
    """What a command has found out goes to the file that the user has named; its folder is made.

    Raises:
        UserError: it cannot be written; names flag and file.
    """
    with writing(f"{flag} {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), text)


def append_whole(path: Path, data: bytes) -> None:
    """Add to a file and flush it to disk. Raises `OSError`; then the file is as it was, where the disk still obeys."""
    new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise
    if new:
        sync(path.parent)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that the target is the old or the new one, never a part; nothing if they are equal."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        _temporary(target).unlink(missing_ok=True)  # of a copy that was killed
        return
    with _beside(target) as temporary:
        shutil.copyfile(source, temporary)


def _temporary(path: Path) -> Path:
    """Always the same, so that what a kill left behind is written over."""
    return path.with_name(f"{path.name}.tmp")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError:  # a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without such a thing for folders
            raise
    finally:
        os.close(handle)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within a folder and wait until the name is on the disk. Raises `OSError`; then it has its old name."""
    os.replace(source, target)
    try:
        sync(target.parent)
    except OSError:
        os.replace(target, source)
        raise


def sync_all(folder: Path) -> None:
    """The same for a folder with everything in it."""
    for place, _, files in os.walk(folder):
        for name in files:
            sync(Path(place) / name)
        sync(Path(place))
