"""What a torch_dist checkpoint holds, seen as the parameters of one architecture.

The checkpoint's files are torch.distributed.checkpoint's, read one tensor at a time: the stock reader wants the whole
state dict, and trusts the files; this one holds one tensor and runs no code of theirs.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from ..checkpoint.folders import is_complete
from ..checkpoint.integrity import INTEGRITY, REMEDY, compare_file, has_integrity, told_files
from ..checkpoint.state import require_checkpoint
from ..checkpoint.torch_dist_metadata import METADATA_NAME, read_metadata
from ..config.lora import ADAPTER, LoRA
from ..config.run import VERIFY_LEVELS
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.adapters import merged_parts, names_of_adapter
from ..models.architecture import Architecture
from ..models.hf_config import zero_experts_of
from ..models.on_disk import ZEDA_NAME, ModelFacts, read_facts, weight_folders
from ..models.weight_kinds import ModelDims, WeightMapping
from ..models.weight_map import MTP
from ..regular_file import open_regular
from .layout import Box, Layout, Parameter, model_layout, stacked


class CheckedFiles:
    """Files of a checkpoint folder, compared with `integrity.json` when they are first needed.

    Hashing everything beforehand would read every byte twice from the disk; this way a file is in memory when it is
    used. Each file is looked at once; threads that need the same file wait for the one that looks.

    Args:
        folder: checkpoint folder.
        flag: the flag that named it, for messages.
        level: "hash" compares size and SHA-256, "size" the size only, "none" nothing.

    Raises:
        UserError: a file is missing or has another size, which is looked up for all of them at once.
    """

    def __init__(self, folder: Path, flag: str, level: str):
        if level not in VERIFY_LEVELS:
            raise UserError(
                f"--verify-checkpoint {level!r} is unknown; choose one of {', '.join(VERIFY_LEVELS)}"
            )
        self._folder, self._flag, self._level = folder, flag, level
        self._told: dict[str, tuple[int, str]] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock, self._seen = threading.Lock(), set()
        if level != "none" and has_integrity(folder):
            told = told_files(folder)
            if told is None:
                raise self._error(f"{INTEGRITY} cannot be read")
            self._told = told
            for name, (size, sha256) in sorted(told.items()):
                self._compare(name, size, sha256, "size")
        if not is_complete(folder):
            raise self._error("is not complete")

    def require(self, name: str) -> None:
        """Compare a file unless that was done before; a file that `integrity.json` lacks passes."""
        if self._level != "hash" or name not in self._told:
            return
        with self._lock:
            lock = self._locks[name]
        with lock:
            if name not in self._seen:
                self._compare(name, *self._told[name], "hash")
                self._seen.add(name)

    def _compare(self, name: str, size: int, sha256: str, level: str) -> None:
        damage = compare_file(self._folder / name, size, sha256, level)
        if damage:
            raise self._error(f"{name} {damage}")

    def _error(self, what: str) -> UserError:
        return UserError(f"{self._flag} {self._folder}: {what}; {REMEDY}")


class TorchDistReader:
    """Reads boxes out of a checkpoint, whatever TP/EP/PP layout wrote it. Several threads may share it.

    Args:
        verify: how closely files are looked at before they are read (`integrity.LEVELS`).

    Raises:
        UserError: no such checkpoint, unreadable index, a missing, truncated or changed file.
    """

    def __init__(self, folder: str | os.PathLike, verify: str = "hash"):
        self.folder = require_checkpoint(folder, "--megatron")
        self._files = CheckedFiles(self.folder, "--megatron", verify)
        self._files.require(METADATA_NAME)
        self._metadata = read_metadata(self.folder)
        self._indices: dict[str, dict[tuple[int, ...], list[int]]] = {}
        self._lock = threading.Lock()

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

    def check(self, box: Box) -> None:
        """Raise a `UserError` unless the stored tensor has the box's global shape and holds all of the box."""
        stored = self._tensor(box.key)
        expected = box.global_shape
        if box.may_be_padded and tuple(stored.size[1:]) == expected[1:] and stored.size[0] > expected[0]:
            whole = sum(chunk.sizes.numel() for chunk in stored.chunks) == stored.size.numel()
            expected = tuple(stored.size) if whole else expected
        if tuple(stored.size) != expected:
            raise UserError(
                f"{self.folder}: tensor {box.key} has shape {list(stored.size)}, "
                f"expected {list(box.global_shape)}"
            )
        lengths = [_overlap(box, stored.chunks[number])[1] for number in self._overlapping(box)]
        if sum(torch.Size(part).numel() for part in lengths) != torch.Size(box.shape).numel():
            raise UserError(f"{self.folder}: tensor {box.key} is incomplete; some ranks' files are missing")

    def read(self, box: Box) -> torch.Tensor:
        """Assemble one box from the chunks that overlap it.

        Raises:
            UserError: the stored tensor has another shape or lacks part of the box; a file cannot be read.
        """
        self.check(box)
        numbers, stored = self._overlapping(box), self._tensor(box.key)
        if len(numbers) == 1 and tuple(stored.chunks[numbers[0]].sizes) == box.shape:
            return self._load(box.key, numbers[0])
        target = torch.empty(box.shape, dtype=stored.properties.dtype)
        for number in numbers:
            chunk = stored.chunks[number]
            start, lengths = _overlap(box, chunk)
            target[_window(start, box.offset, lengths)] = self._load(box.key, number)[
                _window(start, chunk.offsets, lengths)
            ]
        return target

    def _load(self, key: str, number: int) -> torch.Tensor:
        """One chunk as it lies on the disk."""
        stored = self._tensor(key)
        chunk = stored.chunks[number]
        place = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise UserError(f"{self.folder / METADATA_NAME}: does not say where tensor {key} is")
        file = self.folder / place.relative_path
        self._files.require(place.relative_path)
        try:
            with open_regular(file) as stream:
                view = _create_file_view(stream, place.offset, place.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{file}: file is missing; the checkpoint is incomplete") from None
        except Exception as error:  # a damaged archive can raise nearly anything
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"{file}: cannot read tensor {key} ({reason})") from error
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tensor.shape) != (
            stored.properties.dtype,
            torch.Size(chunk.sizes),
        ):
            raise UserError(f"{file}: cannot read tensor {key} (it is not what {METADATA_NAME} says)")
        return tensor.contiguous()

    def _overlapping(self, box: Box) -> list[int]:
        """Numbers of the chunks that touch a box. Looked up by the leading axes along which all chunks have
        length 1 (stacked experts): trying every pair would take hours with thousands of experts."""
        chunks = self._tensor(box.key).chunks
        lead = 0
        while lead < len(box.shape) and box.shape[lead] == 1 and all(c.sizes[lead] == 1 for c in chunks):
            lead += 1
        cache_key = f"{box.key}/{lead}"
        with self._lock:
            if cache_key not in self._indices:
                index = self._indices.setdefault(cache_key, {})
                for number, chunk in enumerate(chunks):
                    index.setdefault(tuple(chunk.offsets[:lead]), []).append(number)
        near = self._indices[cache_key].get(tuple(box.offset[:lead]), [])
        return [number for number in near if all(length > 0 for length in _overlap(box, chunks[number])[1])]


def _overlap(box: Box, chunk: ChunkStorageMetadata) -> tuple[list[int], list[int]]:
    start = [max(a, b) for a, b in zip(box.offset, chunk.offsets)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(box.offset, box.shape, chunk.offsets, chunk.sizes)]
    return start, [end - s for s, end in zip(start, ends)]


def _window(start: list[int], origin, lengths: list[int]) -> tuple[slice, ...]:
    return tuple(slice(s - o, s - o + n) for s, o, n in zip(start, origin, lengths))


_MODEL_KEY = re.compile(r"(embedding|decoder|output_layer|mtp)\.")
_ROUTER_KEY = re.compile(r"decoder\.layers\.(\d+\.)?mlp\.router\.weight")
_HEAD_KEY = re.compile(r"decoder\.layers\.(\d+\.)?mlp\.router\.paired\.\w+")


class MegatronModel:
    """Unsharded parameters of a checkpoint, read one by one, wherever they lie.

    Attributes:
        folder: the checkpoint's. folders: that of its base, if it has one, and its own.
        arch: architecture, with the head of multi-token prediction if the checkpoint holds one.

    Args:
        folder: checkpoint folder (or the iteration's folder inside it).
        arch: architecture of the Hugging Face template.
        config: its config.json.
        verify: how closely files are looked at before they are read (`integrity.LEVELS`).

    Raises:
        UserError: incomplete checkpoint, or one that does not belong to this config.
    """

    def __init__(self, folder: Path, arch: Architecture, config: dict[str, Any], verify: str = "hash"):
        places = weight_folders(folder, "--megatron")
        self._readers = [TorchDistReader(place, verify) for place in places[::-1]]
        self.folders, self.folder = places, places[-1]
        keys = self._keys()
        has_head = any(key.startswith(MTP) for key in keys)
        self.arch = arch.with_mtp_head(str(self.folder)) if has_head else arch
        about = read_facts(folder) or read_facts(self.folder)
        self.zero = self._zero_experts(folder, about, config)
        self.adapted_steps = self._adapted_steps(about)
        self.lora = self._adapters(about)
        self.layout: Layout = model_layout(self.arch, self.zero)
        self._check_keys()

    def read(self, parameter: Parameter) -> torch.Tensor:
        """One parameter, unsharded, in its stored type."""
        boxes = [self._stored(box) for box in parameter.boxes]
        parts = [self._holder(box.key).read(box).reshape(-1, *parameter.shape[1:]) for box in boxes]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(parameter.shape)

    def parts(
        self, parameter: Parameter, mapping: WeightMapping, dims: ModelDims, merges: bool = True
    ) -> dict[str, torch.Tensor]:
        """Hugging Face tensors of one parameter, its adapter merged into each of them; they may be views."""
        adapter = self.adapter(parameter) if merges else None
        return merged_parts(mapping, self.read(parameter), adapter, self.lora and self.lora.scale, dims)

    def checked_dtype(self, parameter: Parameter) -> torch.dtype:
        """Stored type of a parameter, whose shape is looked at too, without reading it.

        Raises:
            UserError: it is missing, incomplete, has another shape, or its parts have different types.
        """
        boxes = [self._stored(box) for box in parameter.boxes]
        for box in boxes:
            self._holder(box.key).check(box)
        types = {self._holder(box.key).dtype(box.key) for box in boxes}
        if len(types) > 1 or not all(dtype.is_floating_point for dtype in types):
            raise UserError(f"{self.folder}: {parameter.name} has type {' and '.join(map(str, types))}")
        return types.pop()

    def adapter(self, parameter: Parameter) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`down` [D, in] and `up` [out, D] of a parameter's adapter; None: it has none."""
        if self.lora is None:
            return None
        down, up, expert = names_of_adapter(parameter.name)
        if down not in self._holder(down):
            return None
        return self._part(down, expert), self._part(up, expert)

    def stored(self, key: str) -> torch.Tensor | None:
        """A tensor that is no parameter of the model, such as half an adapter of all experts; None: not there."""
        return self._part(key, None) if key in self._holder(key) else None

    def _part(self, key: str, expert: int | None) -> torch.Tensor:
        """A stored tensor; or the part of it that is an expert's."""
        reader = self._holder(key)
        shape = reader.shape(key)
        if expert is None:
            return reader.read(Box(key, shape, (0,) * len(shape), shape))
        return reader.read(Box(key, shape, (expert, *(0,) * (len(shape) - 1)), (1, *shape[1:])))[0]

    def _keys(self) -> list[str]:
        """Names of all tensors, adapters' too."""
        return list(dict.fromkeys(chain.from_iterable(reader.keys() for reader in self._readers)))

    def _holder(self, key: str) -> TorchDistReader:
        """The reader that has a tensor: the checkpoint's own, before its base's. Where none has it, the last."""
        return next((reader for reader in self._readers if key in reader), self._readers[-1])

    def _stored(self, box):
        """The box itself, or its place in a checkpoint that stacks all layers in one tensor."""
        return box if box.key in self._holder(box.key) else stacked(box, self.arch.megatron["num_layers"])

    def _check_keys(self) -> None:
        known = {self._stored(box).key for parameter in self.layout.parameters for box in parameter.boxes}
        extra = sorted(
            key for key in filter(_MODEL_KEY.match, self._keys()) if key not in known and ADAPTER not in key
        )
        if extra:
            raise UserError(
                f"{self.folder}: holds {len(extra)} tensors that the config lacks, e.g. {extra[0]}; "
                "give the config.json that belongs to this checkpoint"
            )

    def _zero_experts(self, root: Path, about: ModelFacts | None, config: dict[str, Any]) -> ZeroExpertConfig:
        keys = self._keys()
        routers = [key for key in keys if _ROUTER_KEY.fullmatch(key)]
        if not routers:
            raise UserError(f"{self.folder}: holds no router weights; it is no Mixture-of-Experts model")
        real = self.arch.megatron["num_moe_experts"]
        rows = self._holder(routers[0]).shape(routers[0])[-2]
        if rows < real:
            raise UserError(f"{self.folder}: {routers[0]} has {rows} rows, the config {real} experts")
        facts = about or ModelFacts()
        if facts.renormalize_after_drop:
            raise UserError(
                f"{root}: was trained with --renormalize-after-drop (for study), which the exported model does not do"
            )
        if any(map(_HEAD_KEY.fullmatch, keys)):
            return self._paired(real, facts, config)
        if facts.zero_expert_routing == "paired":
            raise UserError(
                f"{self.folder}: {ZEDA_NAME} says paired zero experts, but the checkpoint has no heads "
                "(mlp.router.paired); convert or train it again"
            )
        if rows == real:
            return ZeroExpertConfig()
        if any(key.endswith("mlp.router.zero_output.bias") for key in keys):
            return ZeroExpertConfig(rows - real, "learned")
        kind = (about or zero_experts_of(config)).zero_experts_type
        return ZeroExpertConfig(rows - real, kind)

    def _adapters(self, about: ModelFacts | None) -> LoRA | None:
        if not any(ADAPTER in key for key in self._keys()):
            return None
        if about is None or about.lora is None:
            raise UserError(
                f"{self.folder}: holds adapters, and no {ZEDA_NAME} says their --lora-alpha; put it back beside them"
            )
        return about.lora

    def _adapted_steps(self, about: ModelFacts | None) -> int | None:
        """Steps of distillation. Without zeda.json nobody knows what training has made: the number that the checkpoint
        itself holds is in a pickle, which a conversion never opens."""
        if about is not None:
            return about.adapted_steps
        trained = not all(map(_MODEL_KEY.match, self._keys()))  # an optimizer's state
        return None if trained else 0

    @staticmethod
    def _paired(real: int, facts: ModelFacts, config: dict[str, Any]) -> ZeroExpertConfig:
        """Heads in the checkpoint tell that it is paired; the rest is in zeda.json, else in the template."""
        if facts.paired_score is not None:
            return facts.zero()
        template = zero_experts_of(config)
        return template if template.paired else ZeroExpertConfig(real, zero_expert_routing="paired")
