"""Comparing a Hugging Face folder with a Megatron checkpoint, tensor by tensor, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..models.architecture import dims_of, read_architecture, weight_map_of
from ..models.hf_config import settings_of, zero_experts_of
from ..models.weight_kinds import ModelDims, Setting, WeightMapping
from ..runtime.terminal import progress_bar
from .bits import same_bits
from .carried import carried_differences, own_keys
from .import_checks import check_added, check_not_quantised
from .layout import Parameter
from .megatron_model import MegatronModel
from .published import PublishedReader


def verify(
    hf: str | os.PathLike,
    megatron: str | os.PathLike,
    *,
    workers: int = 1,
    verify_checkpoint: str = "hash",
    progress: bool = True,
) -> list[str]:
    """Compare every tensor of a Hugging Face folder with a Megatron checkpoint, bit for bit.

    Zero experts that only the checkpoint has are allowed: the original router rows come first, unchanged. Score and
    thresholds of paired zero experts, which are in config.json, are compared too.

    Returns:
        One line per difference, empty if there is none.

    Raises:
        UserError: one of the two is incomplete, or they are not the same architecture.
    """
    reader = PublishedReader(hf)
    check_not_quantised(reader)
    arch = read_architecture(hf)
    model = MegatronModel(Path(megatron), arch, reader.config, verify_checkpoint)
    arch = model.arch
    weights, dims = weight_map_of(arch), dims_of(arch, paired=model.zero.paired)
    bound = weights.bind(model.layout.shapes(), own_keys(reader, arch), dims, str(reader.folder))
    present, differences = zero_experts_of(reader.config), []
    check_added(reader, bound, present)
    settings = settings_of(reader.config, bound.values()) if present.paired else {}
    for key, name in {"zce_score": "paired_score", "zce_types": "zero_experts_type"}.items():
        was, now = getattr(present, name), getattr(model.zero, name)
        if present.paired and was != now:
            differences.append(f"config.json: {key} {was} became {now}")
    compare = _comparer(reader, model, bound, settings, dims)
    parameters = model.layout.parameters
    bar = progress_bar(len(parameters), "tensor", "verify", progress)
    with bar, ThreadPoolExecutor(workers, "verify") as pool:
        try:
            for lines in pool.map(compare, parameters):
                differences += lines
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return differences + carried_differences(reader, arch, Path(megatron))


def _comparer(
    reader: PublishedReader,
    model: MegatronModel,
    bound: dict[str, WeightMapping],
    settings: dict[str, torch.Tensor],
    dims: ModelDims,
) -> Callable[[Parameter], list[str]]:
    def compare(parameter: Parameter) -> list[str]:
        mapping, lines = bound[parameter.name], []
        if isinstance(mapping, Setting) and mapping.hf in settings:
            lines += _difference(settings[mapping.hf], model.read(parameter), mapping.hf, [(1,)])
        parts = model.parts(parameter, mapping, dims)
        for key, allowed in mapping.hf_shapes(parameter.shape, dims).items():
            if key in reader:
                lines += _difference(reader.read(key), parts[key], key, allowed)
        return lines

    return compare


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
