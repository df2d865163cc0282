"""The folder that a conversion makes: what may be replaced, whether it fits on the disk, how it gets its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..durable_file import rename_durably, sync, sync_all
from ..errors import UserError

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
        key: of what is made, the same when it is made again.
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
