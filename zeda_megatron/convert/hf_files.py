"""Hugging Face checkpoint folders, read one tensor at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from ..checkpoint.own_files import own_file
from ..errors import UserError
from ..regular_file import is_regular, open_regular
from ..strict_json import read_json
from .safetensors_header import TensorEntry, read_header

__all__ = ["INDEX_NAME", "SINGLE_NAME", "HFReader", "read_json"]
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class HFReader:
    """A folder with config.json and safetensors weights; headers are read at once, tensors one by one.

    Nothing of the folder is run: no pickle file is opened, no Python file imported. Which file holds the weights is
    decided as transformers does; where programs would disagree, the folder is refused.

    Raises:
        UserError: missing folder, config.json or shard, truncated or damaged shard, a link out of the folder, an
            index that does not agree with its shards, two sources of weights. The message names file and key.
    """

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
            raise UserError(f"{index}: {key} is in {name}, which is no safetensors file; only those are read")
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
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes == 0:
            return tensor
        with open_regular(entry.file) as stream:
            stream.seek(entry.start)
            if stream.readinto(tensor.view(-1).view(torch.uint8).numpy()) != entry.nbytes:
                raise UserError(f"{entry.file}: shard is truncated inside tensor {key}; download it again")
        return tensor
