"""Megatron -> Hugging Face, streaming, from a checkpoint that any parallel layout wrote.

The walk: checkpoint and template are checked and the result is planned from headers (`megatron_model`); then, shard by
shard on a pool of threads, each parameter is read (`TorchDistReader`), taken apart and cast (`_Target`), and its
parts are written (`safetensors_shards`); config and side files come last, and the folder appears
(`runtime.whole_folder`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.folders import own_file
from ..errors import UserError
from ..models.architecture import Architecture, dims_of, read_architecture, weight_map_of
from ..models.hf_config import (
    SettingsWriter,
    copy_side_files,
    draft_config,
    dynamic_config,
    side_files,
    with_dtype,
    with_stored_dtype,
    write_config,
)
from ..models.weight_kinds import ModelDims, ScoreBias, Setting, WeightMapping
from ..models.weight_map import MTP_THRESHOLD, WeightMap
from ..moe.paired import KEEP_ALL
from ..runtime.whole_folder import check_space, check_target, files_of, staged_folder
from ..strict_json import read_json
from .bits import caster
from .carried import carried_plans, carried_source, cast_carried
from .file_writer import FileWriter, Summary
from .hf_files import SINGLE_NAME
from .layout import Parameter
from .megatron_model import MegatronModel
from .peft_adapter import ADAPTER_FOLDER, write_adapter
from .published.fused_experts import Joined, fused_plans
from .safetensors_shards import (
    DEFAULT_SHARD_BYTES,
    Planned,
    Shard,
    bytes_by_type,
    plan_shards,
    write_index,
)

DRAFTS = "drafts"
"""Folder in an export whose head of multi-token prediction skips nothing: that head alone, static."""


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
    adapters: str = "merged",
    progress: bool = True,
) -> Summary:
    """Export a torch_dist checkpoint, written on any parallel layout, as a Hugging Face folder.

    `hf_template` gives config, tokenizer and generation config. A dynamic model gets the authors' config keys
    and our modeling file; a static one comes out as the plain architecture.

    Args:
        max_shard_bytes: longest shard, in bytes (a longer tensor has a shard of its own).
        workers: threads; each holds one parameter.
        progress: show a bar.
        restart: throw away what an interrupted export to `out` has left, instead of going on from it.
        verify_checkpoint: how closely the checkpoint's files are looked at (`VERIFY_LEVELS`).
        adapters: of a model that was trained with them: "merged" into the weights, or "beside" the weights that were
            frozen, in the folder `adapter`, as peft opens it.

    Raises:
        UserError: checkpoint and template do not fit, or the target is in use; nothing is left behind then.
    """
    check_target(Path(out), overwrite)
    template, cast = Path(hf_template), caster(dtype)
    config_file = own_file(template, "config.json", template)
    side_files(template)
    arch, config = read_architecture(template), read_json(config_file)
    model = MegatronModel(Path(megatron), arch, config, verify_checkpoint)
    arch = model.arch
    carried = carried_source(template, arch)
    dims = dims_of(arch, paired=model.zero.paired)
    beside = adapters == "beside"
    if beside and model.lora is None:
        raise UserError(f"--adapters beside: {model.folder} has none; leave it out")
    target = _Target(model, weight_map_of(arch), dims, cast, merges=not beside)
    along = carried_plans(carried, arch, cast) if carried else ()
    planned = [*target.tensors(), *(replace(plan, source=(None, plan.key)) for plan in along)]
    published = list(_published(planned, arch))
    shards = plan_shards(published, max_shard_bytes)
    settings = target.settings()
    keeps_all = settings.get(MTP_THRESHOLD, 0.0) <= KEEP_ALL
    drafts = list(_published(_drafts(planned, arch), arch)) if keeps_all else []
    aside = [Shard(f"{DRAFTS}/{SINGLE_NAME}", drafts)] if keeps_all else []
    result = dynamic_config(config, model.zero, settings, model.adapted_steps)
    result = with_dtype(with_stored_dtype(result, bytes_by_type(shards)), dtype)

    def made(shard: Shard) -> Iterator[torch.Tensor]:
        last, parts = None, {}

        def plain(plan: Planned) -> torch.Tensor:
            nonlocal last, parts
            parameter, key = plan.source
            if parameter is None:
                return cast_carried(key, carried.read(key), cast)
            if parameter is not last:  # neighbours of one parameter (q, k and v) cost one read
                last, parts = parameter, {}  # free one before the next is read
                parts = target.tensors_of(parameter)
            return parts[key][: plan.shape[0]]  # drafts take the rows of real experts

        for plan in shard.tensors:
            if isinstance(plan.source, Joined):
                for expert in plan.source.experts:
                    yield plan.source.join([plain(one) for one in expert])
            else:
                yield plain(plan)

    request = {
        "direction": "megatron-to-hf",
        "checkpoint": files_of(
            sorted(path for folder in model.folders for path in folder.iterdir() if path.is_file())
        ),
        "template": files_of([config_file, *(carried.files if carried else [])]),
        "max_shard_bytes": max_shard_bytes,
        "dtype": dtype,
        "adapted": model.adapted_steps,
        "adapters": adapters if model.lora else None,
        "torch": torch.__version__,  # another one may write other bytes
    }
    with staged_folder(out, request, overwrite, restart) as staging:
        if staging is not None:
            writer = FileWriter(staging, [*shards, *aside], workers, "export", progress)
            check_space(Path(out), writer.missing_bytes())
            writer.run(lambda shard, stream: shard.write(stream, made(shard)))
            write_index(staging.work, shards)
            copy_side_files(template, staging.work)
            write_config(staging.work, result)
            if beside:
                write_adapter(staging.work / ADAPTER_FOLDER, model, cast)
            if aside:
                write_config(staging.work / DRAFTS, with_dtype(draft_config(config), dtype))
    return Summary(len(published), sum(plan.nbytes for plan in published), model.zero)


def _published(planned: Iterable[Planned], arch: Architecture) -> Iterator[Planned]:
    """The same tensors as the family's folders have them: their names, and experts in one tensor if need be."""
    names = arch.published
    for plan in fused_plans(planned, names.experts) if names.writes_fused else planned:
        yield replace(plan, key=names.published(plan.key))


def _drafts(planned: list[Planned], arch: Architecture) -> Iterator[Planned]:
    """Tensors of the head of multi-token prediction as a static model has them: for engines that draft with it, which
    know nothing of zero experts. Its paired zero experts keep all picks, so it is the same head."""
    head = f"model.layers.{arch.megatron['num_layers']}."
    for plan in planned:
        if plan.key.startswith(head) and ".gate.zero_" not in plan.key:
            rows = arch.megatron["num_moe_experts"] if ".gate." in plan.key else plan.shape[0]
            yield replace(plan, shape=(rows, *plan.shape[1:]))


class _Target:
    """What becomes of Megatron's parameters.

    Args:
        model: the checkpoint.
        weights: map of the architecture.
        dims: numbers of the model.
        cast: what `--dtype` asks for.
        merges: adapters become part of the weights.
    """

    def __init__(
        self,
        model: MegatronModel,
        weights: WeightMap,
        dims: ModelDims,
        cast: Callable[[torch.Tensor], torch.Tensor],
        merges: bool,
    ):
        self._model, self._dims, self._cast, self._merges = model, dims, cast, merges
        self._mappings = {p.name: weights.for_mcore_name(p.name) for p in model.layout.parameters}

    def tensors(self) -> Iterator[Planned]:
        """All tensors, in the model's order.

        Raises:
            UserError: the checkpoint lacks a parameter or has it in another shape.
        """
        for parameter in self._model.layout.parameters:
            shape_only = torch.empty(
                parameter.shape, dtype=self._model.checked_dtype(parameter), device="meta"
            )
            mapping = self._mappings[parameter.name]
            for key, part in self._finished(mapping, mapping.to_hf(shape_only, self._dims)).items():
                yield Planned(key, part.dtype, tuple(part.shape), (parameter, key))

    def settings(self) -> dict[str, float | list[float]]:
        """Keys of config.json that come from the checkpoint."""
        writer = SettingsWriter()
        for parameter in self._model.layout.parameters:
            mapping = self._mappings[parameter.name]
            if isinstance(mapping, Setting):
                writer.add(mapping, self._model.read(parameter))
        return writer.entries()

    def tensors_of(self, parameter: Parameter) -> dict[str, torch.Tensor]:
        """The tensors that a parameter holds, cast; they may be views."""
        mapping = self._mappings[parameter.name]
        return self._finished(mapping, self._model.parts(parameter, mapping, self._dims, self._merges))

    def _finished(self, mapping: WeightMapping, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if isinstance(mapping, ScoreBias):
            return parts
        return {key: self._cast(part) for key, part in parts.items()}
