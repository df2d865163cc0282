"""Write a folder so that it appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zeda_megatron.errors import UserError

# A folder is only ever replaced when it holds one of these: what our own commands write.
OUR_MARKS = (
    "zeda.json",
    "latest_checkpointed_iteration.txt",
    "model.safetensors",
    "model.safetensors.index.json",
)


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuse a target that would destroy something.

    Raises:
        UserError: `target` exists and is not empty (without `overwrite`), or is no checkpoint folder.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: exists and is not a folder; choose another --out")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target}: folder is not empty; choose another --out or pass --overwrite")
    if not any((target / mark).exists() for mark in OUR_MARKS):
        raise UserError(
            f"{target}: holds no checkpoint, --overwrite will not delete it; choose another --out"
        )


@contextmanager
def staged_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Give a fresh folder beside `target`; it takes the target's name when the block ends without an error.

    An exception (Ctrl-C too) removes what was written; a killed process leaves a `.tmp-` folder that no
    command mistakes for a checkpoint.

    Raises:
        UserError: see `check_target`.
    """
    target = Path(target).absolute()
    check_target(target, overwrite)
    staging = target.parent / f"{target.name}.tmp-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise UserError(f"{staging}: cannot create this folder ({error.strerror})") from error
    try:
        yield staging
        check_target(target, overwrite)  # somebody else may have written there meanwhile
        _swap_in(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _swap_in(staging: Path, target: Path) -> None:
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
