"""Size and SHA-256 of every file of a checkpoint, in its `integrity.json`; written with it, compared before a load.

Each writer hashes what it wrote, right after writing (the pages are still in memory); before a load the files are
split over the ranks. PyTorch's own reader checks neither: a flipped bit would go straight into the weights.

A run goes on from the newest checkpoint that is as it was written (`intact_checkpoint`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..durable_file import write_atomically
from ..errors import UserError
from ..regular_file import is_regular, open_regular, require_regular
from ..runtime.agreement import from_rank0, gathered, rank, world_size
from ..strict_json import is_int, read_json
from .folders import find_checkpoint, is_complete, is_plain, iteration_of, iterations, tracked

INTEGRITY = "integrity.json"
REMEDY = "copy the file again from a backup, or give another checkpoint"
_PART = ".integrity.{}.json"


def fingerprint(file: Path, flush: bool = False) -> dict[str, Any]:
    """Size and hash of a regular file, read as a stream; with `flush` it is forced to disk first."""
    with open_regular(file) as stream:
        if flush:
            os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256")
        return {"size": stream.tell(), "sha256": digest.hexdigest()}


def note_own_files(folder: Path, writer: int) -> None:
    """Leave the fingerprints of the files that rank `writer` wrote for `seal` to pick up."""
    files = {file.name: fingerprint(file) for file in folder.glob(f"__{writer}_*.distcp")}
    (folder / _PART.format(writer)).write_text(json.dumps(files))


def seal(folder: Path, known: dict[str, dict[str, Any]] | None = None) -> None:
    """Write `integrity.json` from the writers' notes; files without a note are hashed here. One process calls it.

    `known` are fingerprints that the caller has already, by file name.
    """
    files: dict[str, Any] = dict(known or {})
    for note in sorted(folder.glob(_PART.format("*"))):
        files |= json.loads(note.read_text())
        note.unlink()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if file.name not in files:
            files[file.name] = fingerprint(file, flush=True)
    text = json.dumps({"algorithm": "sha256", "files": files}, indent=1, sort_keys=True)
    write_atomically(folder / INTEGRITY, text + "\n")


def find_damage(folder: Path, level: str = "hash") -> str | None:
    """What is wrong with a checkpoint folder, beginning with the file; None if it is as it was written.

    All processes call it and get the same answer. `level` is one of `VERIFY_LEVELS` (config); "none" looks only whether
    the folder is complete, and so do the others where there is no `integrity.json`.
    """
    found = _find_damage_here(folder, level)
    return min((damage for damage in gathered(found) if damage), default=None)


def has_integrity(folder: Path) -> bool:
    """Whether there is something to compare with. Raises a `UserError` for a pipe of that name."""
    return is_regular(folder / INTEGRITY)


def require_intact(folder: Path, flag: str, level: str) -> Path:
    """The folder; raises `UserError` if it is damaged. All processes call it."""
    damage = find_damage(folder, level)
    if damage:
        raise UserError(f"{flag} {folder}: {damage}; {REMEDY}")
    return folder


def _find_damage_here(folder: Path, level: str) -> str | None:
    if level != "none" and has_integrity(folder):
        files = told_files(folder)
        if files is None:
            return f"{INTEGRITY} cannot be read"
        for name, told in sorted(files.items())[rank() :: world_size()]:
            damage = compare_file(folder / name, *told, level)
            if damage:
                return f"{name} {damage}"
    if not is_complete(folder):
        missing = next(name for name in (".metadata", "metadata.json") if not (folder / name).is_file())
        return f"{missing} is missing"
    return None


def told_files(folder: Path) -> dict[str, tuple[int, str]] | None:
    """What `integrity.json` tells: size and SHA-256 by file name; None if it cannot be read."""
    try:
        files = read_json(folder / INTEGRITY).get("files")
    except UserError:
        return None
    if not isinstance(files, dict) or not all(
        is_plain(name) and _is_told(item) for name, item in files.items()
    ):
        return None
    return {name: (item["size"], item["sha256"]) for name, item in files.items()}


def _is_told(item: Any) -> bool:
    return isinstance(item, dict) and is_int(item.get("size")) and isinstance(item.get("sha256"), str)


def compare_file(file: Path, size: int, sha256: str, level: str) -> str | None:
    """What is wrong with a file, in words that follow its name; None if it is as it was written."""
    try:
        now = require_regular(file).st_size
        if now != size:
            return f"has {now} bytes, {size} were written"
        if level == "hash" and fingerprint(file)["sha256"] != sha256:
            return "has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except UserError:
        return "is no regular file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def intact_checkpoint(
    root: str | Path, flag: str, level: str = "hash", warn: Callable[[str], None] = print
) -> Path | None:
    """The newest intact checkpoint in `root`, or `root` itself if that is one; None if `root` holds none.

    A damaged one is named in a warning and the next older one is taken. All processes call this.

    Args:
        flag: the flag that named `root`, for messages.
        level: how closely to look, see `config.run.VERIFY_LEVELS`.
        warn: gets a line of text.

    Raises:
        UserError: all are damaged, or `root` is a single checkpoint and damaged; the message names the file.
    """
    root = Path(root)
    # Rank 0 looks: others may see a shared file system sooner or later, and all must take the same folder.
    single, found = from_rank0((_is_single(root), _newest_first(root)) if rank() == 0 else (False, []))
    if single:
        return _noted(require_intact(root, flag, level), level, warn)
    damages = []
    for folder in found:
        damage = find_damage(folder, level)
        if damage is None:
            for name, what in damages:
                warn(f"{flag} {root}: {name}/{what}; going on from {folder.name} instead")
            return _noted(folder, level, warn)
        damages.append((folder.name, damage))
    if damages:
        name, what = damages[0]
        raise UserError(
            f"{flag} {root}: {name}/{what}, and no older checkpoint is intact; {REMEDY}, or start in a new folder"
        )
    return None


def _is_single(root: Path) -> bool:
    """`root` is a checkpoint, or what is left of one, rather than a folder of several."""
    return is_complete(root) or has_integrity(root) or iteration_of(root) is not None


def _newest_first(root: Path) -> list[Path]:
    """The tracker's folder and older ones, newest first; without a tracker (or if it is stale) all `iter_*`."""
    found = iterations(root)[::-1]
    named = tracked(root)
    if named is not None and named.is_dir() and iteration_of(named) is not None:
        return [folder for folder in found if iteration_of(folder) <= iteration_of(named)]
    if found and not (named is not None and is_complete(named)):
        return found
    other = find_checkpoint(root)
    return [other] if other is not None else []


def _noted(folder: Path, level: str, warn: Callable[[str], None]) -> Path:
    if level != "none" and iteration_of(folder) is not None and not has_integrity(folder):
        warn(f"{folder}: has no {INTEGRITY}, so it was not verified")
    return folder
