"""Hugging Face checkpoint folders, read one tensor at a time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folders import own_file
from ..errors import UserError
from ..regular_file import is_regular, open_regular
from ..strict_json import MAX_BYTES, is_int, read_json, strict_loads

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the header of one safetensors file and check that it describes exactly the bytes that are there.

    Not by safetensors' own reader: that takes the last of two tensors of one name, and its errors name no tensor.

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
        raise UserError(f"{path}: damaged safetensors header (it is not a JSON object); download it again")
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


def read_part(entry: TensorEntry, key: str, begin: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Load a stretch of one tensor into its own memory: from element `begin` on, as many as `shape` has.

    Raises:
        UserError: the file ends before; naming it and the tensor.
    """
    tensor = torch.empty(shape, dtype=entry.dtype)
    if tensor.nbytes == 0:
        return tensor
    with open_regular(entry.file) as stream:
        stream.seek(entry.start + begin * entry.dtype.itemsize)
        if stream.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:
            raise UserError(f"{entry.file}: shard is truncated inside tensor {key}; download it again")
    return tensor


class HFReader:
    """A folder with config.json and safetensors weights; headers are read at once, tensors one by one.

    Nothing of the folder is run: no pickle file is opened, no Python file imported. Which file holds the weights is
    decided as transformers does; where programs would disagree, the folder is refused.

    Raises:
        UserError: missing folder, config.json or shard, truncated or damaged shard, a link out of the folder, an
            index that does not agree with its shards, two sources of weights. The message names file and key.
    """

    reads = "only float weights can be converted, so give a folder that is not quantised"
    """What a refusal of other weights adds."""
    dequantised = False
    """The tensors are stored as quantised ones, but come out as plain numbers (`published.PublishedReader`)."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: no such folder; give the folder of a Hugging Face model (a model of the Hub has to be "
                "downloaded first: hf download NAME --local-dir DIR)"
            )
        if not (self.folder / "config.json").exists() and (self.folder / "hf_config").is_dir():
            raise UserError(f"{self.folder}: is a Megatron checkpoint; a Hugging Face folder is needed here")
        self.config = read_json(own_file(self.folder, "config.json", self.folder))
        self.files: list[Path] = []
        """Files that hold the weights."""
        self._entries = self._read_entries()

    def _read_entries(self) -> dict[str, TensorEntry]:
        self._refuse_other_sources()
        index_path = own_file(self.folder, INDEX_NAME, self.folder)
        single = own_file(self.folder, SINGLE_NAME, self.folder)
        if not is_regular(index_path):
            if not is_regular(single):
                raise UserError(f"{self.folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}; {self._why()}")
            self.files = [single]
            return read_header(single)
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index_path}: has no weight_map; download it again")
        paths = {key: self._shard(index_path, key, name) for key, name in weight_map.items()}
        self.files = sorted(set(paths.values()))
        if is_regular(single) and single not in self.files:
            raise UserError(
                f"{self.folder}: holds {SINGLE_NAME} and {INDEX_NAME}, which does not name it; transformers reads the "
                "first, others the second: remove the one that is not the model"
            )
        headers = {path: read_header(path) for path in self.files}
        for key, path in paths.items():
            if key not in headers[path]:
                raise UserError(f"{path}: tensor {key} is missing, though {INDEX_NAME} lists it")
        for path, entries in headers.items():
            for key in entries:
                if paths.get(key) != path:
                    also = f"{paths[key].name} too" if key in paths else f"but {INDEX_NAME} does not list it"
                    raise UserError(f"{path}: holds tensor {key}, {also}; download the folder again")
        return {key: headers[path][key] for key, path in paths.items()}

    def _shard(self, index: Path, key: str, name: str) -> Path:
        path = own_file(self.folder, name, f"{index}: {key}")
        if path.suffix != ".safetensors":
            raise UserError(
                f"{index}: {key} is in {name}, which is not a safetensors file; only those are read"
            )
        return path

    def _refuse_other_sources(self) -> None:
        """What would make transformers read other weights than those of the two usual names."""
        if is_regular(self.folder / "adapter_config.json"):
            raise UserError(
                f"{self.folder / 'adapter_config.json'}: an adapter (LoRA) changes the model when it is opened; merge "
                "it first (peft: merge_and_unload, save_pretrained)"
            )
        other = self.config.get("transformers_weights")
        if other is not None:
            raise UserError(
                f"{self.folder / 'config.json'}: transformers_weights {str(other)[:60]!r} names other weights; give "
                f"them the name {SINGLE_NAME} or {INDEX_NAME} and remove the key"
            )

    def _why(self) -> str:
        """What is there in place of the weights."""
        there = sorted(path.name for path in self.folder.glob("*.safetensors"))
        shard = next((name for name in there if re.search(r"-\d+-of-\d+\.", name)), None)
        if shard is not None:
            return f"{shard} is one of several shards, whose index is missing: download {INDEX_NAME} too"
        if there:
            return f"{there[0]} has none of the names that transformers reads"
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if not pickles:
            return "only safetensors work"
        return (
            f"{pickles[0]} is a pickle, which can run any code when it is opened, so it is refused; "
            "save the model as safetensors first"
        )

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
        return read_part(entry, key, 0, entry.shape)
