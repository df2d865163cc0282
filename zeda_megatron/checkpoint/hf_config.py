"""config.json and the small files beside the weights; keys are the authors' (`zce_nums`, `zce_types`).

`zce_logit_bias` is a dial of serving, not of the weights: an import drops it, an export takes it from its template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..config import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import MODELS
from ..strict_json import is_int
from .bits import DTYPES
from .folders import copy_whole, write_atomically
from .own_files import own_file
from .paired_config import PAIRED_KEYS, is_paired, paired_experts_of

_NATIVE_TYPES = {dynamic: native for native, dynamic in (model.MODEL_TYPES for model in MODELS)}
_DYNAMIC = dict(model.ARCHITECTURES for model in MODELS)
_MODELING_FILES = {model.ARCHITECTURES[1]: model.MODELING_FILE for model in MODELS}
_SHARED_FILES = ("zero_expert_model.py", "zero_expert_routing.py")
"""What all modeling files import."""
_DIAL = "zce_logit_bias"
_ADAPTED = "zce_adapted_steps"
"""Steps that the weights have been distilled for, in an export of ours."""
_ZERO_KEYS = ("zce_nums", "zce_types", "use_zce_mask", _DIAL, _ADAPTED, *PAIRED_KEYS)
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.tiktoken",
    "sentencepiece*",
    "LICENSE*",
)


def zero_experts_of(config: dict[str, Any]) -> ZeroExpertConfig:
    """Zero experts that a Hugging Face config describes; none for a static model.

    Raises:
        UserError: `zce_nums` and `zce_types` disagree, or name a kind we do not have; a wrong `zce_routing`.
    """
    if is_paired(config):
        return paired_experts_of(config)
    nums = config.get("zce_nums") or []
    kinds = config.get("zce_types") or (["zero"] if nums else [])
    lists = isinstance(nums, list) and isinstance(kinds, list)
    if not lists or len(nums) != len(kinds) or not all(is_int(n) and n >= 0 for n in nums):
        raise UserError(f"config.json: zce_nums {nums} and zce_types {kinds} must be lists of equal length")
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"config.json: zce_types {kinds} mixes several kinds; only one kind can be converted")
    if not sum(nums):
        return ZeroExpertConfig()
    if kinds[0] not in ("zero", "copy", "learned"):
        raise UserError(f"config.json: zce_types {kinds} is not supported; known: zero, copy, learned")
    return ZeroExpertConfig(num_zero_experts=sum(nums), zero_experts_type=kinds[0])


def adapted_steps_of(config: dict[str, Any]) -> int | None:
    """Steps that a folder's weights have been distilled for; 0: an original. None: adapted, for an unknown time.

    A folder with zero experts that does not say is no original: its authors have trained it.
    """
    steps = config.get(_ADAPTED, None if zero_experts_of(config).num_zero_experts else 0)
    if steps is not None and not (is_int(steps) and steps >= 0):
        raise UserError(
            f"config.json: {_ADAPTED} {str(steps)[:60]!r} must be a whole number from 0, or be left out"
        )
    return steps


def static_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config without zero experts, with the native model type and architecture."""
    native = {name: static for static, name in _DYNAMIC.items()}
    result = {key: value for key, value in config.items() if key not in _ZERO_KEYS}
    result["model_type"] = _NATIVE_TYPES.get(config.get("model_type", ""), config.get("model_type"))
    if config.get("architectures"):
        result["architectures"] = [native.get(name, name) for name in config["architectures"]]
    auto_map = {
        key: value for key, value in (result.pop("auto_map", None) or {}).items() if not _is_ours(value)
    }
    if auto_map:
        result["auto_map"] = auto_map
    return result


def _is_ours(reference: Any) -> bool:
    return isinstance(reference, str) and reference.split(".")[-1] in _MODELING_FILES


def dynamic_config(
    config: dict[str, Any],
    zero: ZeroExpertConfig,
    settings: dict[str, Any] | None = None,
    adapted_steps: int | None = 0,
) -> dict[str, Any]:
    """The config of a model with these zero experts; `static_config` if there are none.

    `settings` are further keys: thresholds of paired zero experts. `adapted_steps`: how long the weights have been
    distilled (`adapted_steps_of`), which goes along so that an import knows.

    `model_type` stays native: transformers knows how to merge that type's per-expert keys, and engines key
    their fast paths on it.
    """
    result = static_config(config)
    adapted = {_ADAPTED: adapted_steps}
    if not zero.num_zero_experts:
        return result if adapted_steps == 0 else {**result, **adapted}
    static_name = (result.get("architectures") or [""])[0]
    name = _DYNAMIC.get(static_name)
    if name is None:
        raise UserError(f"config.json: architecture {static_name!r} has no form with zero experts")
    module = _MODELING_FILES[name].removesuffix(".py")
    if zero.paired:
        more = {"zce_routing": "paired", "zce_score": zero.paired_score, **(settings or {})}
    else:
        more = {key: config[key] for key in (_DIAL,) if key in config}
    return {
        **result,
        "architectures": [name],
        "auto_map": {**result.get("auto_map", {}), "AutoModelForCausalLM": f"{module}.{name}"},
        "zce_nums": [zero.num_zero_experts],
        "zce_types": [zero.zero_experts_type],
        "use_zce_mask": False,
        **more,
        **({} if adapted_steps is None else adapted),
    }


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config after a conversion with `--dtype` (`keep` changes nothing)."""
    if DTYPES[dtype] is None:
        return config
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(DTYPES[dtype]).removeprefix("torch.")}


def with_stored_dtype(config: dict[str, Any], sizes: dict[torch.dtype, int]) -> dict[str, Any]:
    """The config with the type that most bytes of its weights have: loaders with `dtype="auto"` round to what it says.

    Args:
        sizes: bytes of the weights by type. A config that names no type gets none.
    """
    floats = {dtype: size for dtype, size in sizes.items() if dtype.is_floating_point}
    key = next((key for key in ("torch_dtype", "dtype") if key in config), None)
    if key is None or not floats:
        return config
    return {**config, key: str(max(floats, key=floats.__getitem__)).removeprefix("torch.")}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and the modeling files where the config asks for ours."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    file = _MODELING_FILES.get((config.get("architectures") or [""])[0])
    for name in (file, *_SHARED_FILES) if file is not None else ():
        copy_whole(Path(__file__).parents[1] / "serving" / name, folder / name)


def side_files(source: Path) -> list[Path]:
    """Tokenizer, generation config, chat template and licence. Raises `UserError` for a link out of the folder."""
    found = sorted({path for pattern in _SIDE_FILES for path in source.glob(pattern) if path.is_file()})
    return [own_file(source, path.name, source) for path in found]


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy `side_files`; returns the names."""
    target.mkdir(parents=True, exist_ok=True)
    found = side_files(source)
    for path in found:
        copy_whole(path, target / path.name)
    return [path.name for path in found]
