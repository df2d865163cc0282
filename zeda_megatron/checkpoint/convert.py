"""Hugging Face <-> Megatron, streaming: one parameter in memory at a time, every original bit kept."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import ZeroExpertConfig
from ..models.architecture import read_architecture
from ..models.weight_map import Added, ModelDims, ScoreBias, Setting, WeightMapping
from ..models.weight_maps import dims_of, weight_map_of
from ..moe.paired import KEEP_ALL
from .bits import HashingRead, caster, same_bits
from .carried import carried_differences, carried_source, keep_carried, own_keys, write_carried
from .hf_config import (
    copy_side_files,
    dynamic_config,
    static_config,
    with_dtype,
    write_config,
    zero_experts_of,
)
from .hf_files import DEFAULT_SHARD_BYTES, HFReader, HFWriter, read_json
from .import_checks import check_added, check_source, wanted_zero_experts
from .layout import Parameter, model_layout
from .megatron_model import ZEDA_NAME, MegatronModel
from .paired_config import SettingsWriter, settings_of
from .staging import check_target, staged_folder
from .state import TRACKER
from .torch_dist_files import TorchDistWriter

HF_CONFIG_NAME = "hf_config"
RELEASE_NAME = "release"


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
) -> Summary:
    """Import a Hugging Face folder as a Megatron torch_dist checkpoint.

    Writes OUT/release/, OUT/latest_checkpointed_iteration.txt, OUT/hf_config/ and OUT/zeda.json. With
    `num_zero_experts` the routers are widened by seeded rows (`models.zero_rows`); all else keeps its bits. With
    `zero_expert_routing` "paired" every layer gets a fresh head, which keeps all picks (`moe.paired`). Zero experts
    that the folder already has are taken as they are.

    Raises:
        UserError: anything wrong with the source or the target; nothing is left behind then.
    """
    check_target(Path(out), overwrite)
    reader, cast = HFReader(hf), caster(dtype)
    arch = read_architecture(hf)
    real = arch.megatron["num_moe_experts"]
    present = zero_experts_of(reader.config)
    zero = wanted_zero_experts(
        reader, real, num_zero_experts, zero_experts_type, zero_expert_routing, paired_score
    )
    zero.validate(real, arch.megatron["moe_router_topk"])
    layout = model_layout(arch, zero)
    weights, dims = weight_map_of(arch), dims_of(arch, seed)
    bound = weights.bind(layout.shapes(), own_keys(reader, arch), dims, str(reader.folder))
    check_source(reader, layout, bound, dims, weights.tied)
    check_added(reader, bound, present)
    settings = settings_of(reader.config, bound.values()) if present.paired else {}
    read, nbytes = HashingRead(lambda key: settings[key] if key in settings else reader.read(key)), 0
    with staged_folder(out, overwrite) as staging:
        (staging / RELEASE_NAME).mkdir()
        with TorchDistWriter(staging / RELEASE_NAME) as writer:
            for parameter in tqdm(layout.parameters, desc="import", disable=None):
                mapping = bound[parameter.name]
                if not isinstance(mapping, Setting):
                    tensor = _import_one(reader, read, mapping, parameter, dims)
                    tensor = tensor if isinstance(mapping, ScoreBias) else cast(tensor)
                elif present.paired:
                    tensor = mapping.to_mcore(read, parameter.shape, dims)
                else:
                    tensor = torch.full(parameter.shape, KEEP_ALL, dtype=torch.float32)
                nbytes += tensor.nbytes
                for box, part in zip(parameter.boxes, _rows(tensor, parameter)):
                    writer.add(box, part)
            for key in layout.objects:
                writer.add_empty_object(key)
            writer.finish({"iteration": 0, "checkpoint_version": 3.0})
        copy_side_files(reader.folder, staging / HF_CONFIG_NAME)
        write_config(staging / HF_CONFIG_NAME, with_dtype(static_config(reader.config), dtype))
        keep_carried(reader, arch, staging / HF_CONFIG_NAME, cast)
        facts = {
            "num_zero_experts": zero.num_zero_experts,
            "zero_experts_type": zero.zero_experts_type,
            "zero_expert_routing": zero.zero_expert_routing,
            **({"paired_score": zero.paired_score} if zero.paired else {}),
            "seed": seed,
            "dtype": dtype,
            "source_architecture": arch.name,
            "source_sha256": read.digest(),
        }
        (staging / ZEDA_NAME).write_text(json.dumps(facts, indent=2) + "\n")
        (staging / TRACKER).write_text(RELEASE_NAME + "\n")
    return Summary(len(layout.parameters), nbytes, zero)


def megatron_to_hf(
    megatron: str | os.PathLike,
    hf_template: str | os.PathLike,
    out: str | os.PathLike,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str = "keep",
    overwrite: bool = False,
) -> Summary:
    """Export a torch_dist checkpoint, written on any parallel layout, as a Hugging Face folder.

    `hf_template` gives config, tokenizer and generation config. A dynamic model gets the authors' config keys
    and our modeling file; a static one comes out as the plain architecture.

    Raises:
        UserError: checkpoint and template do not fit, or the target is in use; nothing is left behind then.
    """
    check_target(Path(out), overwrite)
    template, cast = Path(hf_template), caster(dtype)
    arch, config = read_architecture(template), read_json(template / "config.json")
    model = MegatronModel(Path(megatron), arch, config)
    weights, dims = weight_map_of(arch), dims_of(arch)
    carried = carried_source(template, arch)
    with staged_folder(out, overwrite) as staging:
        writer, settings = HFWriter(staging, max_shard_bytes), SettingsWriter()
        for parameter in tqdm(model.layout.parameters, desc="export", disable=None):
            tensor, mapping = model.read(parameter), weights.for_mcore_name(parameter.name)
            if isinstance(mapping, Setting):
                settings.add(mapping, tensor)
            for key, part in mapping.to_hf(tensor, dims).items():
                writer.add(key, part if isinstance(mapping, ScoreBias) else cast(part))
        if carried is not None:
            write_carried(carried, arch, writer, cast)
        count = writer.finish()
        copy_side_files(template, staging)
        write_config(staging, with_dtype(dynamic_config(config, model.zero, settings.entries()), dtype))
    return Summary(count, writer.total_bytes, model.zero)


def verify(hf: str | os.PathLike, megatron: str | os.PathLike) -> list[str]:
    """Compare every tensor of a Hugging Face folder with a Megatron checkpoint, bit for bit.

    Zero experts that only the checkpoint has are allowed: the original router rows come first, unchanged. Score and
    thresholds of paired zero experts, which are in config.json, are compared too.

    Returns:
        One line per difference, empty if there is none.

    Raises:
        UserError: one of the two is incomplete, or they are not the same architecture.
    """
    reader, arch = HFReader(hf), read_architecture(hf)
    model = MegatronModel(Path(megatron), arch, reader.config)
    weights, dims = weight_map_of(arch), dims_of(arch)
    bound = weights.bind(model.layout.shapes(), own_keys(reader, arch), dims, str(reader.folder))
    present, differences = zero_experts_of(reader.config), []
    check_added(reader, bound, present)
    settings = settings_of(reader.config, bound.values()) if present.paired else {}
    if present.paired and present.paired_score != model.zero.paired_score:
        differences.append(f"config.json: zce_score {present.paired_score} became {model.zero.paired_score}")
    for parameter in tqdm(model.layout.parameters, desc="verify", disable=None):
        mapping = bound[parameter.name]
        if isinstance(mapping, Setting) and mapping.hf in settings:
            differences += _difference(settings[mapping.hf], model.read(parameter), mapping.hf, [(1,)])
        parts = mapping.to_hf(model.read(parameter), dims)
        for key, allowed in bound[parameter.name].hf_shapes(parameter.shape, dims).items():
            if key in reader:
                differences += _difference(reader.read(key), parts[key], key, allowed)
    return differences + carried_differences(reader, arch, Path(megatron))


def _difference(original: torch.Tensor, ours: torch.Tensor, key: str, allowed) -> list[str]:
    if tuple(original.shape) not in allowed:
        return [f"{key}: shape {list(original.shape)} became {list(ours.shape)}"]
    ours = ours[: original.shape[0]]
    if original.dtype != ours.dtype:
        return [f"{key}: type {original.dtype} became {ours.dtype}"]
    if same_bits(original, ours):
        return []
    changed = (original != ours).sum().item()
    return [f"{key}: {changed} of {original.numel()} values differ"]


def _import_one(
    reader: HFReader, read: HashingRead, mapping: WeightMapping, parameter: Parameter, dims: ModelDims
) -> torch.Tensor:
    if isinstance(mapping, Added) and mapping.hf not in reader:
        return torch.zeros(parameter.shape, dtype=reader.dtype(reader.keys()[0]))
    return mapping.to_mcore(read, parameter.shape, dims)


def _rows(tensor: torch.Tensor, parameter: Parameter) -> tuple[torch.Tensor, ...]:
    """Cut a parameter into the rows of its boxes."""
    return tensor.split([box.shape[-tensor.dim()] for box in parameter.boxes])
