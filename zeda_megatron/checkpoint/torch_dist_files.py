"""Megatron's torch_dist checkpoints (torch.distributed.checkpoint files), one tensor at a time.

The stock writer and reader want the whole state dict; these hold one tensor.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from ..errors import UserError
from .integrity import require_intact
from .layout import Box
from .state import require_checkpoint

DATA_NAME = "__0_0.distcp"


class TorchDistWriter:
    """Writes the model part of a checkpoint that `megatron.core.dist_checkpointing.load` reads.

    Use as a context manager around `add`; call `finish` inside it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._stream = (self.folder / DATA_NAME).open("wb")
        self._metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._stream.close()

    def add(self, box: Box, tensor: torch.Tensor) -> None:
        """Write one box; `tensor` has the box's elements in order (stacked axes may be missing)."""
        part = tensor.detach().reshape(box.shape)
        if part.untyped_storage().nbytes() != part.nbytes or not part.is_contiguous():
            part = part.clone(memory_format=torch.contiguous_format)  # torch.save writes the whole storage
        known = self._metadata.setdefault(
            box.key,
            TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(box.global_shape), []),
        )
        if known.properties.dtype != part.dtype:
            raise UserError(
                f"Megatron's {box.key} would mix {known.properties.dtype} and {part.dtype}; "
                "pass --dtype to make them one"
            )
        known.chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)))
        self._write(MetadataIndex(box.key, torch.Size(box.offset), len(known.chunks) - 1), part)

    def add_empty_object(self, key: str) -> None:
        """Write one of Megatron's `_extra_state` objects, which hold nothing outside FP8."""
        self._metadata[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), [None])

    def _write(self, index: MetadataIndex, value: Any) -> None:
        start = self._stream.tell()
        torch.save(value, self._stream)
        length = self._stream.tell() - start
        self._results.append(WriteResult(index, length, _StorageInfo(DATA_NAME, start, length)))

    def finish(self, common: dict[str, Any]) -> None:
        """Write the index, Megatron's common state and its format marker."""
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
        from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        FileSystemWriter(self.folder).finish(Metadata(self._metadata), [self._results])
        torch.save(common, self.folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


class _OneTensor(LoadPlanner):
    """Receives the pieces of a single tensor."""

    def __init__(self, target: torch.Tensor):
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        window = tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths))
        return self.target[window]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner


class TorchDistReader:
    """Reads boxes out of a checkpoint, whatever TP/EP/PP layout wrote it.

    Raises:
        UserError: no such checkpoint, unreadable index, a missing, truncated or changed file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = require_intact(require_checkpoint(folder, "--megatron"), "--megatron", "hash")
        self._reader = FileSystemReader(self.folder)
        try:
            self._metadata = self._reader.read_metadata()
        except FileNotFoundError:
            raise UserError(
                f"{self.folder / '.metadata'}: file is missing; the checkpoint is incomplete"
            ) from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise UserError(f"{self.folder / '.metadata'}: cannot be read ({error})") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._indices: dict[str, dict[tuple[int, ...], list[int]]] = {}

    def __contains__(self, key: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata.get(key), TensorStorageMetadata)

    def _tensor(self, key: str) -> TensorStorageMetadata:
        if key not in self:
            raise UserError(f"{self.folder}: tensor {key} is missing")
        return self._metadata.state_dict_metadata[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape."""
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored type."""
        return self._tensor(key).properties.dtype

    def keys(self) -> list[str]:
        """Names of all tensors (a training checkpoint's optimizer states too)."""
        return [key for key in self._metadata.state_dict_metadata if key in self]

    def read(self, box: Box) -> torch.Tensor:
        """Assemble one box from the chunks that overlap it.

        Raises:
            UserError: the stored tensor has another shape or lacks part of the box.
        """
        stored = self._tensor(box.key)
        expected = box.global_shape
        if box.may_be_padded and tuple(stored.size[1:]) == expected[1:] and stored.size[0] > expected[0]:
            expected = tuple(stored.size)
        if tuple(stored.size) != expected:
            raise UserError(
                f"{self.folder}: tensor {box.key} has shape {list(stored.size)}, "
                f"expected {list(box.global_shape)}"
            )
        items = [self._read_item(box, number) for number in self._overlapping(box)]
        if sum(item.lengths.numel() for item in items) != torch.Size(box.shape).numel():
            raise UserError(f"{self.folder}: tensor {box.key} is incomplete; some ranks' files are missing")
        target = torch.empty(box.shape, dtype=stored.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _OneTensor(target))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: file is missing; the checkpoint is incomplete") from None
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
            files = sorted({self._metadata.storage_data[item.storage_index].relative_path for item in items})
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.folder / files[0]}: cannot read tensor {box.key} ({reason})") from error
        return target

    def _overlapping(self, box: Box) -> list[int]:
        """Numbers of the chunks that touch a box. Looked up by the leading axes along which all chunks have
        length 1 (stacked experts): trying every pair would take hours with thousands of experts."""
        chunks = self._tensor(box.key).chunks
        lead = 0
        while lead < len(box.shape) and box.shape[lead] == 1 and all(c.sizes[lead] == 1 for c in chunks):
            lead += 1
        cache_key = f"{box.key}/{lead}"
        if cache_key not in self._indices:
            index = self._indices.setdefault(cache_key, {})
            for number, chunk in enumerate(chunks):
                index.setdefault(tuple(chunk.offsets[:lead]), []).append(number)
        near = self._indices[cache_key].get(tuple(box.offset[:lead]), [])
        return [number for number in near if all(length > 0 for length in _overlap(box, chunks[number])[1])]

    def _read_item(self, box: Box, number: int) -> ReadItem:
        chunk = self._tensor(box.key).chunks[number]
        start, lengths = _overlap(box, chunk)
        return ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(box.key),
            dest_offsets=torch.Size(s - o for s, o in zip(start, box.offset)),
            storage_index=MetadataIndex(box.key, chunk.offsets, number),
            storage_offsets=torch.Size(s - o for s, o in zip(start, chunk.offsets)),
            lengths=torch.Size(lengths),
        )


def _overlap(box: Box, chunk: ChunkStorageMetadata) -> tuple[list[int], list[int]]:
    start = [max(a, b) for a, b in zip(box.offset, chunk.offsets)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(box.offset, box.shape, chunk.offsets, chunk.sizes)]
    return start, [end - s for s, end in zip(start, ends)]
