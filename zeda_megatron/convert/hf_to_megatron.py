"""Hugging Face -> Megatron, streaming: a few tensors in memory at a time, every original bit kept.

The walk: everything is checked and planned from headers (`import_checks`, `layout`); then, file by file on a pool of
threads, each parameter is read and hashed (`published`), joined and cast (`_Source`), and written
(`torch_dist_writer`); index, hashes and `zeda.json` come last, and the folder appears (`runtime.whole_folder`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.state import TRACKER
from ..errors import UserError
from ..models.architecture import dims_of, read_architecture, weight_map_of
from ..models.hf_config import (
    adapted_steps_of,
    copy_side_files,
    settings_of,
    side_files,
    static_config,
    with_dtype,
    write_config,
    zero_experts_of,
)
from ..models.on_disk import HF_CONFIG_NAME, ZEDA_NAME, ModelFacts
from ..models.weight_kinds import Added, ModelDims, ScoreBias, Setting, WeightMapping
from ..moe.paired import KEEP_ALL
from ..runtime.whole_folder import check_space, check_target, files_of, staged_folder
from .bits import HashingRead, caster, source_digest
from .carried import carried_plans, cast_carried, own_keys
from .file_writer import FileStream, FileWriter, Summary
from .import_checks import (
    check_added,
    check_float_types,
    check_not_quantised,
    check_source,
    wanted_zero_experts,
)
from .layout import Parameter, model_layout
from .published import PublishedReader
from .safetensors_shards import DEFAULT_SHARD_BYTES, Shard, plan_shards, write_index
from .torch_dist_writer import DataFile, Filled, data_files, finish

RELEASE_NAME = "release"
_CARRIED_BELOW = f"{HF_CONFIG_NAME}/carried/"


def hf_to_megatron(
    hf: str | os.PathLike,
    out: str | os.PathLike,
    num_zero_experts: int | None = None,
    zero_experts_type: str = "zero",
    seed: int = 1234,
    dtype: str = "keep",
    overwrite: bool = False,
    zero_expert_routing: str | None = None,
    paired_score: str | None = None,
    mtp: bool = False,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int = 1,
    restart: bool = False,
    progress: bool = True,
) -> Summary:
    """Import a Hugging Face folder as a Megatron torch_dist checkpoint.

    Writes OUT/release/, OUT/latest_checkpointed_iteration.txt, OUT/hf_config/ and OUT/zeda.json. With
    `num_zero_experts` the routers are widened by seeded rows (`models.weight_kinds`); all else keeps its bits. With
    `zero_expert_routing` "paired" every layer gets a fresh head, which keeps all picks (`moe.paired`). Zero experts
    that the folder already has are taken as they are.

    Args:
        mtp: make the head of multi-token prediction a part of the Megatron model, zero experts and all; else its
            tensors are carried along.
        max_shard_bytes: longest data file, in bytes (a longer tensor has a file of its own).
        workers: threads; each holds one parameter.
        progress: show a bar.
        restart: throw away what an interrupted import to `out` has left, instead of going on from it.

    Raises:
        UserError: anything wrong with the source or the target; nothing is left behind then.
    """
    check_target(Path(out), overwrite)
    reader, cast = PublishedReader(hf), caster(dtype)
    side_files(reader.folder)
    check_not_quantised(reader)
    arch = read_architecture(hf)
    arch = arch.with_mtp_head("--mtp") if mtp else arch
    real = arch.megatron["num_moe_experts"]
    present = zero_experts_of(reader.config)
    zero = wanted_zero_experts(
        reader, real, num_zero_experts, zero_experts_type, zero_expert_routing, paired_score
    )
    zero.validate(real, arch.megatron["moe_router_topk"])
    layout = model_layout(arch, zero)
    weights, dims = weight_map_of(arch), dims_of(arch, seed, zero.paired)
    own = own_keys(reader, arch)
    bound = weights.bind(layout.shapes(), own, dims, str(reader.folder))
    check_float_types(reader, dtype)
    check_source(reader, layout, bound, dims, weights.tied)
    check_added(reader, bound, present)
    settings = settings_of(reader.config, bound.values()) if present.paired else None
    source = _Source(reader, bound, dims, cast, settings, reader.dtype(own[0]))
    items = [Filled(parameter, source.dtype(parameter)) for parameter in layout.parameters]
    files = data_files(items, layout.objects, f"{RELEASE_NAME}/", max_shard_bytes)
    carried = list(carried_plans(reader, arch, cast))
    shards = plan_shards(carried, below=_CARRIED_BELOW) if carried else []

    def write(file: DataFile | Shard, stream: FileStream) -> dict[str, Any] | None:
        if isinstance(file, Shard):
            file.write(stream, (cast_carried(t.key, reader.read(t.key), cast) for t in file.tensors))
            return None
        read = HashingRead(source.read)
        places = file.write(stream, (source.make(item.parameter, read) for item in file.items))
        return {"places": places, "sources": read.lines()}

    facts = ModelFacts(
        adapted_steps=adapted_steps_of(reader.config), seed=seed, dtype=dtype, source_architecture=arch.name
    ).with_zero(zero)
    request = {
        "direction": "hf-to-megatron",
        "source": files_of([reader.folder / "config.json", *reader.files]),
        "max_shard_bytes": max_shard_bytes,
        **({"mtp": True} if mtp else {}),
        **facts.entries(),
        "torch": torch.__version__,  # another one may write other bytes
    }
    with staged_folder(out, request, overwrite, restart) as staging:
        if staging is not None:
            writer = FileWriter(staging, [*files, *shards], workers, "import", progress)
            check_space(Path(out), writer.missing_bytes())
            done = writer.run(write)[: len(files)]
            common = {"iteration": 0, "checkpoint_version": 3.0, "adapted_steps": facts.adapted_steps}
            finish(staging.work / RELEASE_NAME, files, done, common)
            hf_config = staging.work / HF_CONFIG_NAME
            copy_side_files(reader.folder, hf_config)
            config = with_dtype(static_config(reader.config), dtype)
            write_config(hf_config, config)
            if shards:
                write_index(staging.work / _CARRIED_BELOW, shards)
                write_config(staging.work / _CARRIED_BELOW, config)
            digest = source_digest(line for file in done for line in file.facts["sources"])
            (staging.work / ZEDA_NAME).write_text(replace(facts, source_sha256=digest).text())
            (staging.work / TRACKER).write_text(RELEASE_NAME + "\n")
    return Summary(len(layout.parameters), sum(item.nbytes for file in files for item in file.items), zero)


class _Source:
    """What Megatron's parameters are made of.

    Args:
        reader: the Hugging Face folder.
        bound: mapping of each parameter.
        dims: numbers of the model.
        cast: what `--dtype` asks for.
        settings: numbers that config.json holds for paired zero experts; None if they are new.
        new_dtype: type of parameters that the folder lacks, before the cast.
    """

    def __init__(
        self,
        reader: PublishedReader,
        bound: dict[str, WeightMapping],
        dims: ModelDims,
        cast: Callable[[torch.Tensor], torch.Tensor],
        settings: dict[str, torch.Tensor] | None,
        new_dtype: torch.dtype,
    ):
        self._reader, self._bound, self._dims, self._cast = reader, bound, dims, cast
        self._settings, self._new_dtype = settings, new_dtype

    def read(self, key: str) -> torch.Tensor:
        """One tensor or setting of the folder."""
        return self._settings[key] if self._settings and key in self._settings else self._reader.read(key)

    def _is_new(self, mapping: WeightMapping) -> bool:
        return isinstance(mapping, Added) and mapping.hf not in self._reader

    def make(self, parameter: Parameter, read: HashingRead) -> torch.Tensor:
        """One parameter: its sources read (by `read`, which hashes them), joined, cast."""
        mapping = self._bound[parameter.name]
        if isinstance(mapping, Setting) and self._settings is None:
            return torch.full(parameter.shape, KEEP_ALL, dtype=torch.float32)
        if self._is_new(mapping):
            return torch.zeros(parameter.shape, dtype=self.dtype(parameter))
        tensor = mapping.to_mcore(read, parameter.shape, self._dims)
        return tensor if isinstance(mapping, Setting | ScoreBias) else self._cast(tensor)

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type that a parameter will have. Raises `UserError` if its sources have several."""
        mapping = self._bound[parameter.name]
        if isinstance(mapping, Setting):
            return torch.float32
        if self._is_new(mapping):
            stored = self._new_dtype
        else:
            keys = mapping.hf_shapes(parameter.shape, self._dims)
            stored = self._common_type([key for key in keys if key in self._reader])
        return stored if isinstance(mapping, ScoreBias) else self._cast(torch.empty(0, dtype=stored)).dtype

    def _common_type(self, keys: list[str]) -> torch.dtype:
        types = [self._reader.dtype(key) for key in keys]
        wide = max(types, key=lambda dtype: dtype.itemsize)
        other = keys[types.index(wide)]
        for key, dtype in zip(keys, types):
            if dtype != wide and self._cast(torch.empty(0, dtype=dtype)).dtype == dtype:
                raise UserError(
                    f"{self._reader.entry(key).file}: tensor {key} is {dtype}, but {other}, with which it is "
                    f"joined, is {wide}; pass --dtype to make them one"
                )
        return wide
