"""The folder that a conversion makes: what may be replaced, whether it fits on the disk, how it gets its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

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


def swap_in(staging: Path, target: Path) -> None:
    """Give a finished folder the target's name; what had it before is deleted afterwards."""
    if not target.exists():
        staging.rename(target)
        return
    old = target.parent / f"{target.name}.old-{os.getpid()}"
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
