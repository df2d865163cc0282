"""Hugging Face checkpoint folders, one tensor at a time: neither side ever holds the whole model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from zeda_megatron.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 2_000_000_000

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


def read_json(path: Path) -> dict:
    """Parse a JSON object, or raise a `UserError` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the header of one safetensors file and check that every tensor's bytes are there.

    Raises:
        UserError: missing or truncated file, damaged header, or a type this reader does not know.
    """
    if not path.is_file():
        raise UserError(f"{path}: shard is missing; download it again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: shard is truncated inside its header ({size} bytes); download it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{path}: damaged safetensors header ({error}); download it again") from error
    header.pop("__metadata__", None)
    entries = {}
    for key, item in header.items():
        dtype = DTYPES.get(item["dtype"])
        if dtype is None:
            raise UserError(f"{path}: tensor {key} has type {item['dtype']}, which cannot be converted")
        begin, end = item["data_offsets"]
        entry = TensorEntry(path, dtype, tuple(item["shape"]), 8 + length + begin, end - begin)
        if entry.start + entry.nbytes > size:
            raise UserError(
                f"{path}: shard is truncated, tensor {key} ends at byte {entry.start + entry.nbytes} "
                f"but the file has {size}; download it again"
            )
        if math.prod(entry.shape) * dtype.itemsize != entry.nbytes:
            raise UserError(f"{path}: damaged safetensors header, size and shape of {key} disagree")
        entries[key] = entry
    return entries


class HFReader:
    """A folder with config.json and safetensors weights; headers are read at once, tensors one by one.

    Raises:
        UserError: missing folder, config.json or shard, truncated shard, or an index that names a key its
            shard does not hold. The message names file and key.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; give a Hugging Face model folder")
        self.config = read_json(self.folder / "config.json")
        self._entries = self._read_entries()

    def _read_entries(self) -> dict[str, TensorEntry]:
        index_path = self.folder / INDEX_NAME
        if not index_path.exists():
            if not (self.folder / SINGLE_NAME).exists():
                raise UserError(
                    f"{self.folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}; only safetensors work"
                )
            return read_header(self.folder / SINGLE_NAME)
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index_path}: has no weight_map; download it again")
        headers = {name: read_header(self.folder / name) for name in sorted(set(weight_map.values()))}
        for key, name in weight_map.items():
            if key not in headers[name]:
                raise UserError(
                    f"{self.folder / name}: tensor {key} is missing, though {INDEX_NAME} lists it"
                )
        return {key: headers[name][key] for key, name in weight_map.items()}

    def keys(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def entry(self, key: str) -> TensorEntry:
        """Shape, type and place of one tensor, from the header alone."""
        try:
            return self._entries[key]
        except KeyError:
            raise UserError(f"{self.folder}: tensor {key} is missing") from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Stored shape, without loading."""
        return self.entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Stored type, without loading."""
        return self.entry(key).dtype

    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self._entries.values())

    def check_shape(self, key: str, allowed: Iterable[tuple[int, ...]]) -> None:
        """Raise a `UserError` naming file, key and shapes unless the stored shape is one of `allowed`."""
        allowed = [tuple(shape) for shape in allowed]
        entry = self.entry(key)
        if entry.shape not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            raise UserError(f"{entry.file}: tensor {key} has shape {list(entry.shape)}, expected {wanted}")

    def read(self, key: str) -> torch.Tensor:
        """Load one tensor into its own memory (plain reads: pages of an mmap would count and linger)."""
        entry = self.entry(key)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes == 0:
            return tensor
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            if stream.readinto(tensor.view(-1).view(torch.uint8).numpy()) != entry.nbytes:
                raise UserError(f"{entry.file}: shard is truncated inside tensor {key}; download it again")
        return tensor


class HFWriter:
    """Safetensors shards with an index, written as tensors come; holds at most one shard (or larger tensor).

    Write into a folder of `staging.staged_folder`, so that an interrupted export never looks complete.
    `finish()` gives the shards their final names and writes the index.
    """

    def __init__(self, folder: str | os.PathLike, max_shard_bytes: int = DEFAULT_SHARD_BYTES):
        if max_shard_bytes <= 0:
            raise UserError(f"--max-shard-bytes must be positive, not {max_shard_bytes}")
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._buffer: dict[str, torch.Tensor] = {}
        self._buffered_bytes = 0
        self._shards: list[list[str]] = []
        self._seen: set[str] = set()

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Take one tensor; a full shard is written out first."""
        if key in self._seen:
            raise ValueError(f"tensor {key} was added twice")
        if self._buffer and self._buffered_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        # A view would keep its whole base alive (q, k and v are cut out of one tensor).
        tensor = tensor.detach()
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._buffer[key] = tensor
        self._seen.add(key)
        self._buffered_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _part(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.part"

    def _flush(self) -> None:
        save_file(self._buffer, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._buffer))
        self._buffer = {}
        self._buffered_bytes = 0

    def finish(self) -> int:
        """Write what is left, name the shards, write the index (none for a single shard, like transformers).

        Returns the number of tensors.
        """
        if self._buffer or not self._shards:
            self._flush()
        count = len(self._shards)
        mode = self.folder.stat().st_mode & 0o666  # safetensors writes 0600, which colleagues cannot read
        weight_map = {}
        for number, keys in enumerate(self._shards):
            name = SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / name)
            (self.folder / name).chmod(mode)
            weight_map.update(dict.fromkeys(keys, name))
        if count > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return len(self._seen)
