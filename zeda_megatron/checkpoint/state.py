"""Training state on disk: `iter_*/` folders in Megatron's torch_dist format and an atomic tracker file.

A checkpoint is written under a temporary name and renamed when complete, so a folder called `iter_*` is always
whole. The tracker names the newest one; if it is missing or stale, the newest whole folder is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import UserError

_HEAD = ".router.paired."
TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def _is_rank0() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_complete(folder: Path) -> bool:
    """A torch_dist checkpoint whose last file, `metadata.json`, was written."""
    return (folder / "metadata.json").is_file() and (folder / ".metadata").is_file()


def find_checkpoint(root: str | Path) -> Path | None:
    """The newest whole checkpoint folder in `root` (or `root` itself if it is one); None if there is none."""
    root = Path(root)
    if is_complete(root):
        return root
    tracker = root / TRACKER
    if tracker.is_file():
        name = tracker.read_text().strip()
        named = root / (
            "release" if name == "release" else f"iter_{int(name):07d}" if name.isdigit() else name
        )
        if name and is_complete(named):
            return named
    whole = [folder for folder in _iterations(root) if is_complete(folder)]
    if whole:
        return whole[-1]
    return root / "release" if is_complete(root / "release") else None


def _iterations(root: Path) -> list[Path]:
    """Folders `iter_*`, oldest first."""
    found = ((_ITERATION.fullmatch(folder.name), folder) for folder in root.glob("iter_*"))
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found if match)]


def require_checkpoint(root: str | Path, flag: str) -> Path:
    """As `find_checkpoint`, but raises `UserError` naming the flag."""
    if not Path(root).is_dir():
        raise UserError(f"{flag} {root}: no such folder")
    found = find_checkpoint(root)
    if found is None:
        raise UserError(
            f"{flag} {root}: holds no complete Megatron checkpoint (looked for release/ and iter_*/)"
        )
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write, flush to disk, rename: the file has the old or the new content, never a part."""
    temporary = path.with_name(path.name + f".tmp-{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(root: str | Path, iteration: int, state: dict[str, Any], keep: int = 0) -> Path:
    """Save a sharded state dict as `root/iter_<iteration>`; all processes call it.

    Args:
        state: Megatron sharded state dict (`model`, `optimizer`) plus plain values that are equal on all ranks.
        keep: keep only so many `iter_*` folders, this one and the newest; 0 keeps all.
    """
    root = Path(root)
    final = root / f"iter_{iteration:07d}"
    partial = root / f".{final.name}.partial"
    if _is_rank0():
        for left_over in (*root.glob(".iter_*.partial"), *root.glob(".iter_*.deleted")):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        dist_checkpointing.save(state, str(partial))
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"--save {root}: cannot be written ({_first_line(cause)})") from error
    barrier()
    if _is_rank0():
        replaced = _set_aside(final) if final.exists() else None
        os.replace(partial, final)
        write_atomically(root / TRACKER, str(iteration))
        others = [folder for folder in _iterations(root) if folder != final]
        surplus = others[: len(others) - (keep - 1)] if keep > 0 else []
        for old in (replaced, *map(_set_aside, surplus)):
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def _set_aside(folder: Path) -> Path:
    """Rename before deleting: a process killed meanwhile leaves no half folder that is called `iter_*`."""
    aside = folder.with_name(f".{folder.name}.deleted")
    os.replace(folder, aside)
    return aside


def load_checkpoint(folder: Path, state: dict[str, Any], flag: str) -> dict[str, Any]:
    """Load `folder` into a sharded state dict. Raises `UserError` naming folder and reason."""
    try:
        return dist_checkpointing.load(state, str(folder))
    except CheckpointException as error:  # a BaseException: what went wrong on some ranks
        cause = next(iter(error.failures.values()))[0]
    except (
        CheckpointingException,
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        ValueError,
        UnpicklingError,
    ) as error:
        cause = error
    if isinstance(cause, (CheckpointingException, KeyError)):
        raise UserError(f"{flag} {folder}: does not fit this model: {_first_line(cause)}") from cause
    raise UserError(
        f"{flag} {folder}: cannot be read ({type(cause).__name__}: {_first_line(cause)})"
    ) from cause


def _first_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    # Megatron would list every tensor that it did find.
    name, missing, _ = text.partition(" from model not in state dict")
    if missing:
        return f"it has no {name}"
    return text.splitlines()[0][:300] if text else type(error).__name__


def load_weights(
    model_chunks: list[torch.nn.Module], folder: Path, flag: str, fresh_heads: bool = False
) -> None:
    """Load the weights of a checkpoint into bare (unwrapped) model chunks.

    With `fresh_heads`, a checkpoint without heads of paired zero experts is fine: they keep their initial values.
    """
    wanted = model_state(model_chunks)
    fresh = fresh_heads and not _has_heads(folder)
    if fresh:
        wanted = {
            name: {key: value for key, value in part.items() if _HEAD not in key}
            for name, part in wanted.items()
        }
    state = load_checkpoint(folder, wanted, flag)
    for name, chunk in _named(model_chunks):
        missing, unexpected = chunk.load_state_dict(state[name], strict=not fresh)
        lost = [key for key in missing if _HEAD not in key]
        if lost or unexpected:
            raise UserError(f"{flag} {folder}: does not fit this model: {(lost + unexpected)[0]}")


def _has_heads(folder: Path) -> bool:
    try:
        return any(_HEAD in key for key in FileSystemReader(folder).read_metadata().state_dict_metadata)
    except (OSError, EOFError, UnpicklingError):
        return False  # loading tells what is wrong with the folder


def model_state(model_chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state dict of model chunks: `model` for one, `model0`, `model1`, ... for several."""
    return {name: chunk.sharded_state_dict() for name, chunk in _named(model_chunks)}


def _named(model_chunks: list[torch.nn.Module]):
    if len(model_chunks) == 1:
        return [("model", model_chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(model_chunks)]


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop lines of metrics.jsonl behind `last_step` (and a torn last line), so a resumed run has each step once."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
    write_atomically(path, "".join(line + "\n" for line in kept))
