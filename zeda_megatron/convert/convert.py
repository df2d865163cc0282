"""Hugging Face <-> Megatron, streaming: a few tensors in memory at a time, every original bit kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.own_files import own_file
from ..checkpoint.state import TRACKER
from ..config import ZeroExpertConfig
from ..models.architecture import read_architecture
from ..models.bits import caster, source_digest
from ..models.hf_config import (
    adapted_steps_of,
    copy_side_files,
    dynamic_config,
    settings_of,
    side_files,
    static_config,
    with_dtype,
    with_stored_dtype,
    write_config,
    zero_experts_of,
)
from ..models.on_disk import HF_CONFIG_NAME, ZEDA_NAME, ModelFacts
from ..models.weight_maps import dims_of, weight_map_of
from ..runtime.partial import files_of, partial_folder
from ..runtime.target import check_space, check_target
from .carried import carried_plans, carried_source, own_keys, read_carried
from .export_plan import ExportPlan
from .hf_files import HFReader, read_json
from .import_checks import (
    check_added,
    check_float_types,
    check_not_quantised,
    check_source,
    wanted_zero_experts,
)
from .import_plan import ImportPlan
from .layout import model_layout
from .megatron_model import MegatronModel
from .parts import PartWriter
from .safetensors_shards import DEFAULT_SHARD_BYTES, bytes_by_type, plan_shards, write_index
from .torch_dist_writer import finish
from .verify import verify

__all__ = ["DEFAULT_SHARD_BYTES", "Summary", "hf_to_megatron", "megatron_to_hf", "verify"]
RELEASE_NAME = "release"
_CARRIED_BELOW = f"{HF_CONFIG_NAME}/carried/"


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    tensors: int
    """Tensors written (of the target's format)."""
    nbytes: int
    """Their size."""
    zero: ZeroExpertConfig
    """Zero experts of the result."""


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
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int = 1,
    restart: bool = False,
) -> Summary:
    """Import a Hugging Face folder as a Megatron torch_dist checkpoint.

    Writes OUT/release/, OUT/latest_checkpointed_iteration.txt, OUT/hf_config/ and OUT/zeda.json. With
    `num_zero_experts` the routers are widened by seeded rows (`models.weight_kinds`); all else keeps its bits. With
    `zero_expert_routing` "paired" every layer gets a fresh head, which keeps all picks (`moe.paired`). Zero experts
    that the folder already has are taken as they are.

    Args:
        max_shard_bytes: longest data file, in bytes (a longer tensor has a file of its own).
        workers: threads; each holds one parameter.
        restart: throw away what an interrupted import to `out` has left, instead of going on from it.

    Raises:
        UserError: anything wrong with the source or the target; nothing is left behind then.
    """
    check_target(Path(out), overwrite)
    reader, cast = HFReader(hf), caster(dtype)
    side_files(reader.folder)
    check_not_quantised(reader)
    arch = read_architecture(hf)
    real = arch.megatron["num_moe_experts"]
    present = zero_experts_of(reader.config)
    zero = wanted_zero_experts(
        reader, real, num_zero_experts, zero_experts_type, zero_expert_routing, paired_score
    )
    zero.validate(real, arch.megatron["moe_router_topk"])
    layout = model_layout(arch, zero)
    weights, dims = weight_map_of(arch), dims_of(arch, seed, zero.paired)
    bound = weights.bind(layout.shapes(), own_keys(reader, arch), dims, str(reader.folder))
    check_float_types(reader, dtype)
    check_source(reader, layout, bound, dims, weights.tied)
    check_added(reader, bound, present)
    settings = settings_of(reader.config, bound.values()) if present.paired else None
    plan = ImportPlan(reader, bound, dims, cast, settings)
    files = plan.data_files(layout, f"{RELEASE_NAME}/", max_shard_bytes)
    carried = list(carried_plans(reader, arch, cast))
    shards = plan_shards(carried, read_carried(reader, cast), below=_CARRIED_BELOW) if carried else []
    facts = ModelFacts(
        adapted_steps=adapted_steps_of(reader.config), seed=seed, dtype=dtype, source_architecture=arch.name
    ).with_zero(zero)
    source = files_of([reader.folder / "config.json", *reader.files])
    request = _request("hf-to-megatron", source=source, max_shard_bytes=max_shard_bytes, **facts.entries())
    with partial_folder(out, request, overwrite, restart) as partial:
        if partial is not None:
            writer = PartWriter(partial, [*files, *shards], workers, "import")
            check_space(Path(out), writer.missing_bytes())
            done = writer.run()[: len(files)]
            common = {"iteration": 0, "checkpoint_version": 3.0, "adapted_steps": facts.adapted_steps}
            finish(partial.work / RELEASE_NAME, files, done, common)
            hf_config = partial.work / HF_CONFIG_NAME
            copy_side_files(reader.folder, hf_config)
            config = with_dtype(static_config(reader.config), dtype)
            write_config(hf_config, config)
            if shards:
                write_index(partial.work / _CARRIED_BELOW, shards)
                write_config(partial.work / _CARRIED_BELOW, config)
            digest = source_digest(line for part in done for line in part.facts["sources"])
            (partial.work / ZEDA_NAME).write_text(replace(facts, source_sha256=digest).text())
            (partial.work / TRACKER).write_text(RELEASE_NAME + "\n")
    return Summary(len(layout.parameters), sum(item.nbytes for file in files for item in file.items), zero)


def megatron_to_hf(
    megatron: str | os.PathLike,
    hf_template: str | os.PathLike,
    out: str | os.PathLike,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str = "keep",
    overwrite: bool = False,
    *,
    workers: int = 1,
    restart: bool = False,
    verify_checkpoint: str = "hash",
) -> Summary:
    """Export a torch_dist checkpoint, written on any parallel layout, as a Hugging Face folder.

    `hf_template` gives config, tokenizer and generation config. A dynamic model gets the authors' config keys
    and our modeling file; a static one comes out as the plain architecture.

    Args:
        max_shard_bytes: longest shard, in bytes (a longer tensor has a shard of its own).
        workers: threads; each holds one parameter.
        restart: throw away what an interrupted export to `out` has left, instead of going on from it.
        verify_checkpoint: how closely the checkpoint's files are looked at (`integrity.LEVELS`).

    Raises:
        UserError: checkpoint and template do not fit, or the target is in use; nothing is left behind then.
    """
    check_target(Path(out), overwrite)
    template, cast = Path(hf_template), caster(dtype)
    config_file = own_file(template, "config.json", template)
    side_files(template)
    arch, config = read_architecture(template), read_json(config_file)
    model = MegatronModel(Path(megatron), arch, config, verify_checkpoint)
    carried = carried_source(template, arch)
    dims = dims_of(arch, paired=model.zero.paired)
    plan = ExportPlan(model, weight_map_of(arch), dims, cast, carried)
    shards = plan_shards(plan.tensors(arch), plan.make, max_shard_bytes)
    result = dynamic_config(config, model.zero, plan.settings(), model.adapted_steps)
    result = with_dtype(with_stored_dtype(result, bytes_by_type(shards)), dtype)
    request = _request(
        "megatron-to-hf",
        checkpoint=files_of(sorted(path for path in model.folder.iterdir() if path.is_file())),
        template=files_of([config_file, *(carried.files if carried else [])]),
        max_shard_bytes=max_shard_bytes,
        dtype=dtype,
        adapted=model.adapted_steps,
    )
    with partial_folder(out, request, overwrite, restart) as partial:
        if partial is not None:
            writer = PartWriter(partial, shards, workers, "export")
            check_space(Path(out), writer.missing_bytes())
            writer.run()
            write_index(partial.work, shards)
            copy_side_files(template, partial.work)
            write_config(partial.work, result)
    tensors = [planned for shard in shards for planned in shard.tensors]
    return Summary(len(tensors), sum(planned.nbytes for planned in tensors), model.zero)


def _request(make: str, **facts: Any) -> dict[str, Any]:
    """What a conversion makes, as `partial_folder` wants it. Another PyTorch may write other bytes."""
    return {"direction": make, **facts, "torch": torch.__version__}
