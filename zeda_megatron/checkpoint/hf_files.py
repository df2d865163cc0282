"""Hugging Face checkpoint folders, read one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import UserError
from ..strict_json import read_json
from .own_files import own_file
from .safetensors_header import TensorEntry, read_header

__all__ = ["INDEX_NAME", "SINGLE_NAME", "HFReader", "read_json"]
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class HFReader:
    """A folder with config.json and safetensors weights; headers are read at once, tensors one by one.

    Nothing of the folder is run: no pickle file is opened, no Python file imported.

    Raises:
        UserError: missing folder, config.json or shard, truncated or damaged shard, a link out of the folder, or an
            index that does not agree with its shards. The message names file and key.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; give a Hugging Face model folder")
        self.config = read_json(own_file(self.folder, "config.json", self.folder))
        self.files: list[Path] = []
        """Files that hold the weights."""
        self._entries = self._read_entries()

    def _read_entries(self) -> dict[str, TensorEntry]:
        index_path = own_file(self.folder, INDEX_NAME, self.folder)
        if not index_path.exists():
            single = own_file(self.folder, SINGLE_NAME, self.folder)
            if not single.exists():
                raise UserError(f"{self.folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}; {self._why()}")
            self.files = [single]
            return read_header(single)
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index_path}: has no weight_map; download it again")
        paths = {key: self._shard(index_path, key, name) for key, name in weight_map.items()}
        self.files = sorted(set(paths.values()))
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
            raise UserError(f"{index}: {key} is in {name}, which is no safetensors file; only those are read")
        return path

    def _why(self) -> str:
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
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes == 0:
            return tensor
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            if stream.readinto(tensor.view(-1).view(torch.uint8).numpy()) != entry.nbytes:
                raise UserError(f"{entry.file}: shard is truncated inside tensor {key}; download it again")
        return tensor
