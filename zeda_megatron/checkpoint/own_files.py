"""Files that belong to a checkpoint folder: by a plain name, and no link that leads somewhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError


def own_file(folder: Path, name: Any, where: str | Path, root: Path | None = None) -> Path:
    """The path of a file that a checkpoint names.

    Links inside the folder are fine, and so are those of the Hugging Face cache (`snapshots/X/` to `blobs/`).

    Args:
        where: what names the file, for the message.
        root: the checkpoint's folder, if `folder` is one inside it.

    Raises:
        UserError: `name` is no plain file name, or leads out of the folder.
    """
    if not is_plain(name):
        raise UserError(f"{where}: names the file {str(name)[:100]!r}, which is no plain file name")
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
