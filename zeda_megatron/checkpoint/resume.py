"""Which checkpoint a run goes on from: the newest one that is as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..runtime.agreement import from_rank0, rank
from .folders import find_checkpoint, is_complete, iteration_of, iterations, tracked
from .integrity import INTEGRITY, REMEDY, find_damage, has_integrity, require_intact


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
