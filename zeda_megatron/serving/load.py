"""Load a model from its folder: ours, the authors' published ones, and static ones.

Folders whose weights are packed (`zeda quantize --packed`, or NVIDIA ModelOpt: int8 or fp8 with scales) are read back
as plain numbers. transformers does not know the experts of these formats: it would take integers for weights. Here
every weight is multiplied by its scale while it is read, so the model in memory is as large as an unquantised one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import UserError
from ..models.architecture import REGISTRY, read_architecture
from .pack import SCALE

PACKERS = ("compressed-tensors", "modelopt")
"""Formats of weights with scales, as `quantization_config` names them."""


def load_zero_expert_model(folder: str | os.PathLike, **kwargs):
    """Load a folder with zero experts as a transformers model; needs no `trust_remote_code`.

    transformers does not know the authors' `model_type` (`qwen3_moe_plus_plus`) and would not merge the per-expert
    weights; it is read as the native one. Packed weights are multiplied by their scales.
    `kwargs` go to `from_pretrained`.

    Raises:
        UserError: an unknown architecture; weights that are missing, or that the model has no place for.
        ValueError: the config asks for no zero experts, or for a kind that is not supported.
    """
    arch = read_architecture(folder)
    model = REGISTRY[arch.name]
    module = import_module(f".transformers.{model.MODELING_FILE.removesuffix('.py')}", __package__)
    dynamic = getattr(module, model.ARCHITECTURES[1])
    fields = arch.hf | {"model_type": model.MODEL_TYPES[0]}
    if packed_by(fields) not in PACKERS:
        config = dynamic.config_class.from_dict(fields)
        return _whole(dynamic, folder, folder, config=config, **kwargs)
    del fields["quantization_config"]
    config = dynamic.config_class.from_dict(fields)
    dtype = kwargs.pop("dtype", None) or config.dtype
    return _whole(
        dynamic, folder, None, config=config, state_dict=unpacked(folder, dtype), dtype=dtype, **kwargs
    )


def load_model(folder: str | os.PathLike, **kwargs):
    """Load a folder with or without zero experts; otherwise as `load_zero_expert_model`."""
    import transformers

    arch = read_architecture(folder)
    if arch.num_zero_experts:
        return load_zero_expert_model(folder, **kwargs)
    return _whole(getattr(transformers, arch.name), folder, folder, **kwargs)


def _whole(kind, where: str | os.PathLike, folder: str | os.PathLike | None, **kwargs):
    """`from_pretrained`, refused where transformers would draw weights that it does not find, and report it only."""
    model, found = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    for what, why in (("missing", "is missing"), ("unexpected", "has no place in this model")):
        names = sorted(found[f"{what}_keys"])
        if names:
            raise UserError(f"{where}: tensor {names[0]} {why} ({len(names)} such tensors)")
    return model


_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def packed_by(config: Mapping[str, Any]) -> str | None:
    """Who packed the weights, by config.json's `quantization_config`; None if nobody did."""
    return (config.get("quantization_config") or {}).get("quant_method")


def keys_of(folder: str | Path) -> list[str]:
    """Names of all tensors of a folder; `UserError` if it has no weights."""
    return [name for path in _files(folder) for name in _keys(path)]


def stored_dtype(folder: str | Path) -> torch.dtype:
    """Type of most tensors of a folder, whatever its config.json says.

    Raises:
        UserError: no weights, or most of them are no plain floating-point numbers.
    """
    found: Counter[str] = Counter()
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in list(file.keys()))
    most = found.most_common(1)[0][0] if found else "none"
    if most not in _TYPES:
        raise UserError(f"{folder}: most tensors have type {most}; a folder of plain float weights is needed")
    return _TYPES[most]


def unpacked(folder: str | Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a folder under their names, packed ones as `dtype`, the others as they are.

    Raises:
        UserError: no weights, or a packed weight without a scale that fits.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in _keys(path)}
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(SCALE)}
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.int8, torch.float8_e4m3fn):
            tensors[name] = _times(tensor, scales.get(name + SCALE), f"{folder}: {name}").to(dtype)
    return tensors


def _files(folder: str | Path) -> list[Path]:
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no .safetensors file")
    return files


def _keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _times(packed_OI: torch.Tensor, scale: torch.Tensor | None, where: str) -> torch.Tensor:
    """[O, I] times one number, or one per row; float32."""
    if scale is None or scale.numel() not in (1, packed_OI.shape[0]):
        raise UserError(f"{where} is packed, but has no scale that fits ({where}{SCALE})")
    return packed_OI.float() * scale.float().reshape(-1, 1)
