"""Megatron's torch_dist checkpoints, written in files of bounded size while no more than a tensor is in memory."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..checkpoint.integrity import seal
from ..checkpoint.torch_dist_metadata import write_metadata
from ..errors import UserError
from .file_writer import FileStream, Written
from .layout import Box, Parameter
from .safetensors_shards import group_by_bytes

_ARCHIVE = 1200
"""About what one tensor's archive costs besides its data, in bytes; only for progress and free space."""


@dataclass(frozen=True)
class Filled:
    """A parameter and the type that it is stored in."""

    parameter: Parameter
    """Which."""
    dtype: torch.dtype
    """Type."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.parameter.shape).numel() * self.dtype.itemsize


class DataFile:
    """One `.distcp` file.

    Args:
        name: path below the folder.
        items: parameters, in order.
        objects: keys of empty objects, behind the parameters.
    """

    def __init__(self, name: str, items: Sequence[Filled], objects: Sequence[str] = ()):
        self.name, self.items, self.objects = name, tuple(items), tuple(objects)
        count = sum(len(item.parameter.boxes) for item in items) + len(objects)
        self.nbytes = sum(item.nbytes for item in items) + _ARCHIVE * count

    def write(self, stream: FileStream, made: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
        """Write the file; `made` are the tensors of its items, in order. Returns where each box begins and how long it
        is, then each object."""
        places = []
        for item, tensor in zip(self.items, made, strict=True):
            parameter = item.parameter
            if tensor.dtype != item.dtype:
                raise UserError(f"{parameter.name}: is {tensor.dtype}, planned was {item.dtype}")
            rows = [box.shape[-tensor.dim()] for box in parameter.boxes]
            for box, part in zip(parameter.boxes, tensor.split(rows)):
                places.append(_save(_alone(part.detach().reshape(box.shape)), stream))
        return places + [_save([None], stream) for _ in self.objects]


def data_files(items: Sequence[Filled], objects: Sequence[str], below: str, max_bytes: int) -> list[DataFile]:
    """Deal parameters into files in their order; the last file gets the empty objects too.

    Raises:
        UserError: tensors that Megatron joins have different types.
    """
    check_types(items)
    groups = list(group_by_bytes(items, lambda item: item.nbytes, max_bytes))
    return [
        DataFile(f"{below}__0_{number}.distcp", group, objects if number == len(groups) - 1 else ())
        for number, group in enumerate(groups)
    ]


def _alone(part: torch.Tensor) -> torch.Tensor:
    """The same tensor with no more storage than its own: torch.save writes all of it."""
    if part.untyped_storage().nbytes() == part.nbytes and part.is_contiguous():
        return part
    return part.clone(memory_format=torch.contiguous_format)


def _save(value: Any, stream: FileStream) -> tuple[int, int]:
    start = stream.tell()
    torch.save(value, stream)
    return start, stream.tell() - start


def check_types(items: Sequence[Filled]) -> None:
    """Experts that share one stacked tensor must have one type. Raises `UserError` naming the first that has not."""
    types: dict[str, torch.dtype] = {}
    for item in items:
        for box in item.parameter.boxes:
            known = types.setdefault(box.key, item.dtype)
            if known != item.dtype:
                raise UserError(
                    f"Megatron's {box.key} would mix {known} and {item.dtype} ({item.parameter.name}); "
                    "pass --dtype to make them one"
                )


def finish(folder: Path, files: Sequence[DataFile], done: Sequence[Written], common: dict[str, Any]) -> None:
    """Write what a checkpoint has besides data: index, common state, format marker, hashes of all files."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    write_metadata(folder, _index(files, done))
    buffer = io.BytesIO()  # torch's own writer of files tells a full disk as an error of its inside
    torch.save(common, buffer)
    (folder / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    seal(folder, {Path(d.name).name: {"size": d.size, "sha256": d.sha256} for d in done})


def _index(files: Sequence[DataFile], done: Sequence[Written]) -> Metadata:
    index = Metadata(state_dict_metadata={}, storage_data={})
    chunks: defaultdict[str, list] = defaultdict(list)
    for file, result in zip(files, done, strict=True):
        places = iter(result.facts["places"])
        name = Path(file.name).name
        for item in file.items:
            for box in item.parameter.boxes:
                _enter(index, chunks[box.key], box, item.dtype)
                at = MetadataIndex(box.key, torch.Size(box.offset), len(chunks[box.key]) - 1)
                index.storage_data[at] = _StorageInfo(name, *next(places))
        for key in file.objects:
            index.state_dict_metadata[key] = BytesStorageMetadata()
            index.storage_data[MetadataIndex(key)] = _StorageInfo(name, *next(places))
    return index


def _enter(index: Metadata, chunks: list, box: Box, dtype: torch.dtype) -> None:
    if not chunks:
        index.state_dict_metadata[box.key] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(box.global_shape), chunks
        )
    chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)))
