"""Safetensors shards whose content is planned before the first byte, then streamed tensor by tensor."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .file_writer import FileStream
from .hf_files import DTYPES, INDEX_NAME, SINGLE_NAME

DEFAULT_SHARD_BYTES = 2_000_000_000
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """One tensor of a folder that is to be written."""

    key: str
    """Name."""
    dtype: torch.dtype
    """Type."""
    shape: tuple[int, ...]
    """Shape."""
    source: object
    """What the reader needs to know to make it."""
    parts: int | None = None
    """It is written in so many parts, one for each index of the first axis; None: at once."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """One file: its header comes first, then tensor after tensor, none is kept.

    Args:
        name: path below the folder.
        tensors: content.
    """

    def __init__(self, name: str, tensors: list[Planned]):
        # Wide types first: every tensor then begins at a multiple of its width.
        self.name = name
        self.tensors = sorted(tensors, key=lambda planned: -planned.dtype.itemsize)
        self._header = header_bytes((t.key, t.dtype, t.shape) for t in self.tensors)
        self.nbytes = len(self._header) + sum(planned.nbytes for planned in tensors)

    def write(self, stream: FileStream, made: Iterable[torch.Tensor]) -> None:
        """Write the file; `made` are the tensors of its plans (or their parts), in the order of `tensors`."""
        stream.write(self._header)
        pieces = (t for t in self.tensors for _ in range(1 if t.parts is None else t.parts))
        for planned, tensor in zip(pieces, made, strict=True):
            shape = planned.shape if planned.parts is None else planned.shape[1:]
            if tensor.dtype != planned.dtype or tuple(tensor.shape) != shape:
                raise UserError(
                    f"tensor {planned.key}: is {tensor.dtype} {list(tensor.shape)}, "
                    f"planned was {planned.dtype} {list(shape)}"
                )
            stream.write_tensor(tensor)


def header_bytes(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a file that holds these tensors (key, type, shape) one after the other.

    Raises:
        UserError: a type that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, dtype, shape in tensors:
        if dtype not in _NAMES:
            raise UserError(f"tensor {key}: safetensors has no type {dtype}; pass --dtype")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def plan_shards(
    tensors: Iterable[Planned], max_shard_bytes: int = DEFAULT_SHARD_BYTES, below: str = ""
) -> list[Shard]:
    """Deal tensors into files in their order, none longer than `max_shard_bytes` unless a single tensor is.

    Args:
        below: folder that the names get in front, e.g. "hf_config/carried/".

    Raises:
        UserError: a size that is not positive, a type that the format lacks.
        ValueError: the same key twice.
    """
    groups = list(group_by_bytes(tensors, lambda planned: planned.nbytes, max_shard_bytes)) or [[]]
    keys = [planned.key for group in groups for planned in group]
    if len(set(keys)) < len(keys):
        raise ValueError(f"tensor {next(k for k in keys if keys.count(k) > 1)} was added twice")
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = names if len(groups) > 1 else [SINGLE_NAME]
    return [Shard(below + name, group) for name, group in zip(names, groups)]


def group_by_bytes(items: Iterable, size_of: Callable, max_bytes: int) -> Iterator[list]:
    """Neighbours together, as many as `max_bytes` hold, at least one."""
    if max_bytes <= 0:
        raise UserError(f"--max-shard-bytes must be positive, not {max_bytes}")
    group, total = [], 0
    for item in items:
        if group and total + size_of(item) > max_bytes:
            yield group
            group, total = [], 0
        group.append(item)
        total += size_of(item)
    if group:
        yield group


def bytes_by_type(shards: Iterable[Shard]) -> Counter[torch.dtype]:
    """Size of all tensors by their type."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for planned in shard.tensors:
            sizes[planned.dtype] += planned.nbytes
    return sizes


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Write the index of all keys with the total size; none for a single file, like transformers."""
    if len(shards) == 1:
        return
    tensors = {planned.key: (shard, planned) for shard in shards for planned in shard.tensors}
    index = {
        "metadata": {"total_size": sum(planned.nbytes for _, planned in tensors.values())},
        "weight_map": {key: Path(tensors[key][0].name).name for key in sorted(tensors)},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
