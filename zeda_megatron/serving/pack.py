"""Pack an exported model's weights as 8-bit numbers, in the format of compressed-tensors (llm-compressor's, vLLM's).

Every matrix of a layer gets a scale per row: `...weight` in int8 or E4M3, `...weight_scale` [O, 1] in float32. Engines
that read the format quantise activations as well, token by token as they come; there is nothing to calibrate. Tensor
after tensor is read and written, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..convert.file_writer import FileWriter
from ..convert.hf_files import HFReader
from ..convert.safetensors_shards import DEFAULT_SHARD_BYTES, Planned, Shard, plan_shards, write_index
from ..models.architecture import Architecture
from ..models.hf_config import copy_side_files, write_config
from ..runtime.whole_folder import check_space, files_of, staged_folder
from ..strict_json import read_json

TYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The type of a number format, and its largest number."""
DECIDES = ("gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba")
"""Names of modules that no scale is for: they decide on picks, or on what a gated delta network forgets. ModelOpt's
recipe (0.47) leaves the same alone."""
SCALE = "_scale"
"""`...weight` and `...weight_scale`."""


def packs(key: str, shape: tuple[int, ...], arch: Architecture) -> bool:
    """True for a matrix of a decoder layer that decides nothing."""
    inside = key.startswith("model.layers.") and not arch.is_carried(key)
    decides = any(f".{name}." in key for name in DECIDES)
    return inside and len(shape) == 2 and key.endswith(".weight") and not decides


def scale_of(weight_OI: torch.Tensor, number_format: str) -> torch.Tensor:
    """[O, I] -> float32 [O, 1]; 1 for a row of zeros."""
    most_O1 = weight_OI.float().abs().amax(dim=1, keepdim=True)
    return torch.where(most_O1 > 0, most_O1 / TYPES[number_format][1], 1.0)


def packed(weight_OI: torch.Tensor, number_format: str) -> torch.Tensor:
    """[O, I] in the type of the format."""
    dtype, most = TYPES[number_format]
    scaled_OI = (weight_OI.float() / scale_of(weight_OI, number_format)).clamp(-most, most)
    return (scaled_OI if dtype.is_floating_point else scaled_OI.round()).to(dtype)


def pack(
    source: Path, target: Path, arch: Architecture, number_format: str, overwrite: bool, progress: bool = True
) -> dict[str, int]:
    """Write `target`; returns how many `weights` are packed, and the `parameters` in them.

    Raises:
        UserError: a folder that cannot be read or written; nothing is left behind then.
    """
    reader = HFReader(source)
    planned = list(_plans(reader, arch, number_format))
    shards = plan_shards(planned, DEFAULT_SHARD_BYTES)
    config = read_json(source / "config.json")
    config["quantization_config"] = _quantization(arch, number_format)
    request = {
        "make": "packed",
        "source": files_of([source / "config.json", *reader.files]),
        "number_format": number_format,
        "torch": torch.__version__,
    }

    def made(shard: Shard) -> Iterator[torch.Tensor]:
        for plan in shard.tensors:
            key, how = plan.source
            weight = reader.read(key)
            yield weight if how is None else how(weight, number_format)

    with staged_folder(target, request, overwrite) as staging:
        if staging is not None:
            writer = FileWriter(staging, shards, 1, "pack", progress)
            check_space(target, writer.missing_bytes())
            writer.run(lambda shard, stream: shard.write(stream, made(shard)))
            write_index(staging.work, shards)
            copy_side_files(source, staging.work)
            write_config(staging.work, config)
    sizes = [plan.shape[0] * plan.shape[1] for plan in planned if plan.source[1] is packed]
    return {"weights": len(sizes), "parameters": sum(sizes)}


def _plans(reader: HFReader, arch: Architecture, number_format: str) -> Iterator[Planned]:
    (dtype, _), keys = TYPES[number_format], reader.keys()
    for key in keys:
        shape = reader.shape(key)
        if packs(key, shape, arch):
            yield Planned(key, dtype, shape, (key, packed))
            yield Planned(key + SCALE, torch.float32, (shape[0], 1), (key, scale_of))
        else:
            yield Planned(key, reader.dtype(key), shape, (key, None))


def _quantization(arch: Architecture, number_format: str) -> dict[str, Any]:
    """`quantization_config`, the keys as compressed-tensors writes them."""
    numbers = {
        "num_bits": 8,
        "type": "float" if number_format == "fp8" else "int",
        "symmetric": True,
    }
    behind = "|".join(str(arch.megatron["num_layers"] + more) for more in range(arch.published_heads))
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if number_format == "fp8" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": numbers | {"strategy": "channel", "dynamic": False},
                "input_activations": numbers | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": [
            "lm_head",
            *(rf"re:.*\.{name}$" for name in DECIDES),
            *([rf"re:model\.layers\.({behind})\..*"] if behind else []),
        ],
    }
