"""Size and SHA-256 of every file of a checkpoint, in its `integrity.json`; written with it, compared before a load.

Each writer hashes what it wrote, right after writing (the pages are still in memory); before a load the files are
split over the ranks. PyTorch's own reader checks neither: a flipped bit would go straight into the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..durable_file import write_atomically
from ..errors import UserError
from ..regular_file import is_regular, open_regular, require_regular
from ..runtime.agreement import gathered, rank, world_size
from ..strict_json import is_int, read_json
from .folders import is_complete
from .own_files import is_plain

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
