"""Headers of safetensors files: read with every check that keeps a damaged file from being taken for a good one.

Format: https://github.com/huggingface/safetensors#format. Data follow the header without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..regular_file import is_regular, open_regular
from ..strict_json import MAX_BYTES, is_int, strict_loads

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    file: Path
    """Shard that holds it."""
    dtype: torch.dtype
    """Stored type."""
    shape: tuple[int, ...]
    """Stored shape."""
    start: int
    """First byte, counted from the start of the file."""
    nbytes: int
    """Length in bytes."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the header of one safetensors file and check that it describes exactly the bytes that are there.

    Raises:
        UserError: missing or truncated file, damaged header, or a type this reader does not know.
    """
    if not is_regular(path):
        raise UserError(f"{path}: shard is missing; download it again")
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size >= 8 and length > MAX_BYTES:
            raise UserError(
                f"{path}: damaged safetensors header (it would have {length} bytes); download it again"
            )
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: shard is truncated inside its header ({size} bytes); download it again")
        try:
            header = strict_loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{path}: damaged safetensors header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged safetensors header (it is no JSON object); download it again")
    header.pop("__metadata__", None)
    entries = {key: _entry(path, key, item, 8 + length, size) for key, item in header.items()}
    _check_places(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, key: str, item: Any, data: int, size: int) -> TensorEntry:
    damaged = f"{path}: damaged safetensors header"
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise UserError(f"{damaged}, tensor {key} lacks dtype, shape or data_offsets; download it again")
    name, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise UserError(
            f"{path}: tensor {key} has type {str(name)[:40]}, which cannot be converted; only float weights "
            "can, so give a folder that is not quantised"
        )
    if not _are_lengths(shape):
        raise UserError(f"{damaged}, tensor {key} has shape {str(shape)[:60]}; download it again")
    if not _are_lengths(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{damaged}, tensor {key} has data_offsets {str(offsets)[:60]}; download it again")
    begin, end = offsets
    if data + end > size:
        raise UserError(
            f"{path}: shard is truncated, tensor {key} ends at byte {data + end} "
            f"but the file has {size}; download it again"
        )
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise UserError(f"{damaged}, size and shape of {key} disagree")
    return TensorEntry(path, dtype, tuple(shape), data + begin, end - begin)


def _are_lengths(value: Any) -> bool:
    return isinstance(value, list) and all(is_int(n) and 0 <= n < 2**63 for n in value)


def _check_places(path: Path, entries: dict[str, TensorEntry], data: int, size: int) -> None:
    """Tensors follow each other to the end of the file."""
    end, last = data, "the header"
    for key, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].nbytes)):
        if entry.start != end:
            what = "overlap" if entry.start < end else "have a gap between them"
            raise UserError(
                f"{path}: damaged safetensors header, {last} and tensor {key} {what}; download it again"
            )
        end, last = entry.start + entry.nbytes, f"tensor {key}"
    if end != size:
        raise UserError(f"{path}: has {size - end} bytes behind its last tensor; download it again")


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
