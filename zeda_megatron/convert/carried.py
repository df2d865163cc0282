"""Tensors that are no Megatron parameter, carried along as they are: those behind the decoder's layers (GLM's
multi-token prediction) and those beside the text model (a vision tower).

An import puts them into HF_CONFIG/carried/, an export takes them from its template. They are never widened: their
routers belong to a layer that is not trained. An import with `--mtp` makes parameters of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import filterfalse
from pathlib import Path

import torch

from ..errors import UserError
from ..models.architecture import Architecture
from .bits import same_bits
from .hf_files import INDEX_NAME, SINGLE_NAME, HFReader
from .published import PublishedReader
from .safetensors_shards import Planned

CARRIED_NAME = "carried"
Cast = Callable[[torch.Tensor], torch.Tensor]


def own_keys(reader: HFReader, arch: Architecture) -> list[str]:
    """Keys that Megatron parameters are made of."""
    return list(filterfalse(arch.is_carried, reader.keys()))


def carried_keys(reader: HFReader, arch: Architecture) -> list[str]:
    """Keys that are carried along."""
    return list(filter(arch.is_carried, reader.keys()))


def carried_plans(reader: HFReader, arch: Architecture, cast: Cast) -> Iterator[Planned]:
    """What is to be written for the carried tensors."""
    for key in carried_keys(reader, arch):
        dtype = cast_carried(key, torch.empty(0, dtype=reader.dtype(key)), cast).dtype
        yield Planned(key, dtype, reader.shape(key), key)


def cast_carried(key: str, tensor: torch.Tensor, cast: Cast) -> torch.Tensor:
    """A carried tensor as `--dtype` wants it; no cast rounds a score bias."""
    return tensor if key.endswith("e_score_correction_bias") else cast(tensor)


def carried_source(template: Path, arch: Architecture) -> PublishedReader | None:
    """Where an export with this template finds the carried tensors; None for a model that has none, or whose checkpoint
    holds them as parameters.

    Raises:
        UserError: config.json names multi-token-prediction layers whose weights are not there, or the family has
            tensors beside the text model and the folder has none.
    """
    layers = 0 if arch.mtp_layers else arch.published_heads
    aside = arch.published.aside
    if not (layers or aside or arch.published.may_lack):
        return None
    for folder in (template / CARRIED_NAME, template):
        if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
            reader = PublishedReader(folder)
            if carried_keys(reader, arch):
                return reader
    if not (layers or aside):
        return None
    if not layers:
        raise UserError(
            f"{template}: has no tensor beside the text model ({', '.join(aside)}); give the original folder as "
            "--hf-template"
        )
    raise UserError(
        f"{template}/config.json: num_nextn_predict_layers {layers}, but the folder has no "
        "weights of them; give the original folder as --hf-template, or set the key to 0 to export without them"
    )


def carried_differences(reader: HFReader, arch: Architecture, megatron: Path) -> list[str]:
    """One line for each carried tensor of `reader` that a Megatron checkpoint's folder lacks or has changed."""
    keys = carried_keys(reader, arch)
    roots = (megatron, megatron.parent)
    folder = next((f for root in roots if (f := root / "hf_config" / CARRIED_NAME).is_dir()), None)
    ours = PublishedReader(folder) if folder and keys else None
    lines = []
    for key in keys:
        if ours is None or key not in ours:
            lines.append(f"{key}: is missing in hf_config/{CARRIED_NAME}")
        elif not same_bits(reader.read(key), ours.read(key)):
            lines.append(f"{key}: differs")
    return lines
