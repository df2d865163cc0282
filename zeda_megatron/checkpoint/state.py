"""Training state on disk, in Megatron's torch_dist format: saving it, loading it, loading weights alone.

The front door of this room: what others need of `folders` and `saving` can be had from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..config.lora import ADAPTER
from ..errors import UserError
from ..runtime.agreement import barrier
from ..runtime.worker import is_lost_peer
from .folders import TRACKER, find_checkpoint, is_complete, require_checkpoint
from .integrity import require_intact
from .saving import CheckpointSaver, first_line
from .torch_dist_metadata import data_only, read_metadata

__all__ = [
    "TRACKER",
    "barrier",
    "find_checkpoint",
    "holds_mtp_head",
    "is_complete",
    "load_checkpoint",
    "load_plain_values",
    "load_weights",
    "model_state",
    "require_checkpoint",
    "save_checkpoint",
]
_FITTED = re.compile(r"\.router\.(paired\.|zero_output\.(constant|down|up)$)")
"""Heads of paired zero experts, and stand-ins."""
_MTP = "mtp."
"""How names of a head of multi-token prediction begin."""
_EXTRA = "._extra_state"
"""Of Transformer Engine's modules: statistics of FP8, and a pickle that they open themselves. No weights."""


def save_checkpoint(root: str | Path, iteration: int, state: dict[str, Any], keep: int = 0) -> Path:
    """Save a sharded state dict as `root/iter_<iteration>` and wait for it; all processes call it.

    Args:
        state: Megatron sharded state dict (`model`, `optimizer`) plus plain values that are equal on all ranks.
        keep: keep only so many `iter_*` folders, this one and the newest; 0 keeps all.
    """
    saver = CheckpointSaver(root, keep)
    saver.save(iteration, state)
    return saver.folder(iteration)


def load_checkpoint(folder: Path, state: dict[str, Any], flag: str) -> dict[str, Any]:
    """Load `folder` into a sharded state dict; no code of it is run. Raises `UserError` naming folder and reason."""
    return _load(folder, _index(folder, flag), state, flag)


def _load(folder: Path, index: Metadata, state: dict[str, Any], flag: str) -> dict[str, Any]:
    with data_only(folder, index) as view:
        return _told(lambda place: dist_checkpointing.load(state, place), view, folder, flag)


def load_plain_values(folder: Path, flag: str) -> dict[str, Any]:
    """What a checkpoint holds besides tensors. Raises `UserError` naming folder and reason."""
    with data_only(folder, _index(folder, flag)) as view:  # newer versions keep them among the tensors
        return _told(dist_checkpointing.load_common_state_dict, view, folder, flag)


def _told(load: Callable[[str], dict[str, Any]], place: Path, folder: Path, flag: str) -> dict[str, Any]:
    """Load from `place`, which stands in for `folder`."""
    try:
        return load(str(place))
    except CheckpointException as error:  # a BaseException: what went wrong on some ranks
        cause = next(iter(error.failures.values()), (error,))[0]
    except Exception as error:  # a damaged pickle can raise nearly anything
        cause = error
    if is_lost_peer(cause):
        raise cause
    reason = _first_line(cause).replace(str(place), str(folder))
    if isinstance(cause, (CheckpointingException, KeyError)):
        raise UserError(f"{flag} {folder}: does not fit this model: {reason}") from cause
    raise UserError(f"{flag} {folder}: cannot be read ({type(cause).__name__}: {reason})") from cause


def _first_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    # Megatron would list every tensor that it did find.
    name, missing, _ = text.partition(" from model not in state dict")
    return f"it has no {name}" if missing else first_line(error, text)


def load_weights(
    model_chunks: list[torch.nn.Module],
    folders: Sequence[Path],
    flag: str,
    heads: Literal["stored", "stored or fresh", "fresh"] = "stored",
    verify: str = "hash",
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Load the weights of a checkpoint into bare (unwrapped) model chunks. `models.load` knows its folders.

    What a fit makes of paired zero experts is among them; or keeps its initial values, where the checkpoint has none of
    it (`stored or fresh`) or in any case (`fresh`). Adapters keep theirs where it has none.

    Args:
        folders: that of the whole model, and those of checkpoints that hold part of it, each above the ones before.
        verify: how closely the files are looked at first (`config.run.VERIFY_LEVELS`).
        only: names of the module's parameters and buffers that are loaded.
    """
    for folder in folders:
        require_intact(folder, flag, verify)
    folder, indices = folders[-1], {place: _index(place, flag) for place in folders}
    stored = {key: item for index in indices.values() for key, item in index.state_dict_metadata.items()}
    place_of = {key: place for place, index in indices.items() for key in index.state_dict_metadata}
    for chunk in model_chunks:
        _check_zero_experts(stored, chunk, folder, flag)
        if _has_mtp_head(dict(chunk.named_parameters())) and not _has_mtp_head(stored):
            raise UserError(
                f"{flag} {folder}: has no head of multi-token prediction; convert the model with --mtp"
            )
    fresh = heads == "fresh" or (heads != "stored" and not any(map(_FITTED.search, stored)))
    adapted = any(ADAPTER in key for key in stored)

    def left_out(key: str) -> bool:
        unfitted = fresh and _FITTED.search(key)
        return _EXTRA in key or bool(unfitted) or (ADAPTER in key and not adapted) or not only(key)

    wanted = {
        name: {key: item for key, item in part.items() if not left_out(key)}
        for name, part in model_state(model_chunks).items()
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for place, index in indices.items():
        # What nobody has is asked of the last, which then says so.
        mine = {
            name: {key: item for key, item in part.items() if place_of.get(item.key, folder) == place}
            for name, part in wanted.items()
        }
        if any(mine.values()) or torch.distributed.get_world_size() > 1:  # all ranks read together
            for name, part in _load(place, index, mine, flag).items():
                if name in found:
                    found[name].update(part)
    for name, chunk in _named(model_chunks):
        missing, unexpected = chunk.load_state_dict(found[name], strict=False)
        lost = [key for key in missing if not left_out(key)]
        if lost or unexpected:
            raise UserError(f"{flag} {folder}: does not fit this model: {(lost + unexpected)[0]}")


def stored_names(model_chunks: list[torch.nn.Module], folders: Sequence[Path], flag: str) -> set[str]:
    """Names of the modules' parameters and buffers that are in one of these checkpoint folders."""
    stored = {key for folder in folders for key in _index(folder, flag).state_dict_metadata}
    parts = model_state(model_chunks).values()
    return {name for part in parts for name, item in part.items() if item.key in stored}


def holds_mtp_head(folders: Sequence[Path], flag: str) -> bool:
    """Whether a head of multi-token prediction is among a checkpoint's weights, which lie in these folders."""
    return any(_has_mtp_head(_index(folder, flag).state_dict_metadata) for folder in folders)


def _has_mtp_head(names: Iterable[str]) -> bool:
    return any(name.startswith(_MTP) for name in names)


def _index(folder: Path, flag: str) -> Metadata:
    """What the checkpoint holds, and where; no code of it is run."""
    try:
        return read_metadata(folder)
    except UserError as error:
        raise UserError(f"{flag} {folder}: cannot be read ({error})") from error


def _check_zero_experts(index: dict[str, Any], chunk: torch.nn.Module, folder: Path, flag: str) -> None:
    """The routers have as many rows as the checkpoint's; otherwise the flags ask for another number of zero experts."""
    real = chunk.config.num_moe_experts
    for name, parameter in chunk.named_parameters():
        stored = index.get(name) if name.endswith(".mlp.router.weight") else None
        rows = stored.size[0] if isinstance(stored, TensorStorageMetadata) and len(stored.size) == 2 else None
        if rows is None or rows == parameter.shape[0]:
            continue
        has, asked = rows - real, parameter.shape[0] - real
        what = (
            "leave --num-zero-experts out" if has > 0 else "convert the model with --num-zero-experts first"
        )
        raise UserError(f"{flag} {folder}: has {has} zero experts a layer, not {asked}; {what}")


def model_state(model_chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state dict of model chunks: `model` for one, `model0`, `model1`, ... for several."""
    return {name: chunk.sharded_state_dict() for name, chunk in _named(model_chunks)}


def _named(model_chunks: list[torch.nn.Module]):
    if len(model_chunks) == 1:
        return [("model", model_chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(model_chunks)]
