"""Checkpoint folders and the tracker file: which are there, which is the newest, how one appears and goes.

A checkpoint is written under a temporary name and renamed when complete, so a folder called `iter_*` was whole once.
The tracker names the newest one; if it is missing or stale, the newest whole folder is used.

Files of a folder go by a plain name, and no link leads somewhere else (`own_file`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..regular_file import read_regular, refuse_odd_files

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_of(folder: Path) -> int | None:
    """The step of a folder `iter_*`; None for other folders."""
    match = _ITERATION.fullmatch(folder.name)
    return int(match[1]) if match else None


def iterations(root: Path) -> list[Path]:
    """Folders `iter_*`, oldest first."""
    found = [(iteration_of(folder), folder) for folder in root.glob("iter_*")]
    return [folder for number, folder in sorted(pair for pair in found if pair[0] is not None)]


def is_complete(folder: Path) -> bool:
    """A torch_dist checkpoint whose last file, `metadata.json`, was written."""
    return (folder / "metadata.json").is_file() and (folder / ".metadata").is_file()


def tracked(root: Path) -> Path | None:
    """The folder that the tracker names, there or not; None without a readable tracker.

    Raises:
        UserError: the tracker is a pipe, a device, or far too long.
    """
    try:
        name = read_regular(root / TRACKER, 10_000).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not name or name != Path(name).name or name == ".." or "\0" in name or len(name) > 100:
        return None  # a path would lead out of the folder
    return root / (f"iter_{int(name):07d}" if name.isdecimal() else name)


def find_checkpoint(root: str | Path) -> Path | None:
    """The newest whole checkpoint folder in `root` (or `root` itself if it is one); None if there is none."""
    root = Path(root)
    if is_complete(root):
        return root
    named = tracked(root)
    if named is not None and is_complete(named):
        return named
    whole = [folder for folder in iterations(root) if is_complete(folder)]
    if whole:
        return whole[-1]
    return root / "release" if is_complete(root / "release") else None


def require_checkpoint(root: str | Path, flag: str) -> Path:
    """As `find_checkpoint`, but raises `UserError` naming the flag."""
    require_folder(root, flag)
    found = find_checkpoint(root)
    if found is None:
        raise UserError(
            f"{flag} {root}: holds no complete Megatron checkpoint (looked for release/ and iter_*/)"
        )
    refuse_odd_files(found)
    return found


def require_folder(root: str | Path, flag: str) -> None:
    """Raise a `UserError` naming the flag unless `root` is a folder, and not one of a Hugging Face model."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{flag} {root}: no such folder")
    if (root / "config.json").is_file() and not is_complete(root) and not (root / "hf_config").is_dir():
        raise UserError(
            f"{flag} {root}: is a Hugging Face folder; convert it first (zeda convert hf-to-megatron "
            f"--hf {root} --out DIR)"
        )


def set_aside(folder: Path) -> Path:
    """Rename before deleting: a process killed meanwhile leaves no half folder that is called `iter_*`."""
    aside = folder.with_name(f".{folder.name}.deleted")
    os.replace(folder, aside)
    return aside


def own_file(folder: Path, name: Any, where: str | Path, root: Path | None = None) -> Path:
    """The path of a file that a checkpoint names.

    Links inside the folder are fine, and so are those of the Hugging Face cache (`snapshots/X/` to `blobs/`).

    Args:
        where: what names the file, for the message.
        root: the checkpoint's folder, if `folder` is one inside it.

    Raises:
        UserError: `name` is not a plain file name, or leads out of the folder.
    """
    if not is_plain(name):
        raise UserError(f"{where}: names the file {str(name)[:100]!r}, which is not a plain file name")
    path = folder / name
    linked = path.is_symlink() or (root is not None and folder.is_symlink())
    if linked and not any(_is_below(path, base) for base in _roots(root or folder)):
        raise UserError(f"{path}: is a link to a file outside the folder; put the file itself there")
    return path


def is_plain(name: Any) -> bool:
    """A file's name, without folders."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    try:
        return len(name.encode()) <= 255
    except UnicodeEncodeError:  # half a character
        return False


def _roots(folder: Path) -> list[Path]:
    real = folder.resolve()
    cache = [real.parents[1] / "blobs"] if real.parent.name == "snapshots" else []
    return [real, *cache]


def _is_below(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=False).is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False
