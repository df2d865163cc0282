"""config.json and the small files beside the weights; keys are the authors' (`zce_nums`, `zce_types`). They stand where
the language model has its settings: in `text_config` of a model that sees, too.

`zce_logit_bias` and `zce_batch_margin` are dials of serving, not of the weights: an import drops them, an export takes
them from its template.
Nothing that is written here names any code but ours: people open exports with `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folders import own_file
from ..config.zero_experts import PAIRED_TYPES, SCORE_TERMS, ZERO_EXPERT_ROUTINGS, ZeroExpertConfig
from ..durable_file import copy_whole, write_atomically
from ..errors import UserError
from ..regular_file import is_regular
from ..strict_json import is_int, is_number, read_json
from .architecture import MODELS
from .config_values import text_settings, with_text_settings
from .on_disk import HF_CONFIG_NAME, ZEDA_NAME, ModelFacts
from .weight_kinds import Setting, WeightMapping
from .weight_map import MTP_THRESHOLD

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What `--dtype` of a conversion may be."""
PAIRED_KEYS = ("zce_routing", "zce_score", "zce_threshold", MTP_THRESHOLD, "zce_head_width", "zce_rank")


def is_paired(config: dict[str, Any]) -> bool:
    """True if `zce_routing` says paired; absent means shared. Raises `UserError` for other values."""
    routing = config.get("zce_routing") or "shared"
    if not isinstance(routing, str) or routing not in ZERO_EXPERT_ROUTINGS:
        raise UserError(
            f"config.json: zce_routing {routing!r} is unknown; known: {', '.join(ZERO_EXPERT_ROUTINGS)}"
        )
    return routing == "paired"


def paired_experts_of(config: dict[str, Any]) -> ZeroExpertConfig:
    """The paired zero experts that a Hugging Face config describes.

    Raises:
        UserError: naming the key that is missing or makes no sense.
    """
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    real = next((config[name] for name in names if name in config), None)
    nums, kinds = config.get("zce_nums"), config.get("zce_types") or ["zero"]
    if nums != [real] or kinds not in [[kind] for kind in PAIRED_TYPES]:
        raise UserError(
            f"config.json: zce_nums {nums} with zce_types {kinds} does not fit paired routing, which has one zero "
            f"expert per real one: [{real}] and one of {', '.join(PAIRED_TYPES)}"
        )
    score = config.get("zce_score", ZeroExpertConfig.paired_score)
    terms = score.split("+") if isinstance(score, str) else [None]
    if not set(terms) <= set(SCORE_TERMS) or len(set(terms)) < len(terms):
        raise UserError(
            f"config.json: zce_score {score!r} is unknown; join some of {', '.join(SCORE_TERMS)} with '+'"
        )
    width, rank = (config.get(key, 0) for key in ("zce_head_width", "zce_rank"))
    for key, value in (("zce_head_width", width), ("zce_rank", rank)):
        if not is_int(value) or value < 0:
            raise UserError(f"config.json: {key} {str(value)[:60]!r} must be a whole number from 0")
    if (rank > 0) != (kinds == ["low_rank"]):
        raise UserError(
            f"config.json: zce_rank {rank} does not fit zce_types {kinds}: low_rank alone has a rank"
        )
    return ZeroExpertConfig(real, kinds[0], "paired", score, width, rank)


def settings_of(config: dict[str, Any], mappings: Iterable[WeightMapping]) -> dict[str, torch.Tensor]:
    """The numbers that config.json holds for these mappings, by the name that `Setting` gives them: float32 [1].

    Raises:
        UserError: a key is missing, is no finite number, or is a list of the wrong length.
    """
    config = text_settings(config)
    by_key: dict[str, list[str]] = {}
    for mapping in mappings:
        if isinstance(mapping, Setting):
            by_key.setdefault(mapping.key, []).append(mapping.hf)
    found = {}
    for key, names in by_key.items():
        value = config.get(key)
        if value is None:
            raise UserError(f"config.json: {key} is missing; paired zero experts need a number")
        values = value if isinstance(value, list) else [value] * len(names)
        if len(values) != len(names) or not all(map(is_number, values)):
            raise UserError(
                f"config.json: {key} {value!r} must be a finite number, or a list of {len(names)}, one per MoE layer"
            )
        found |= {name: torch.tensor([v], dtype=torch.float32) for name, v in zip(names, values)}
    return found


class SettingsWriter:
    """Collects the numbers of all layers, in layer order, for config.json."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, mapping: Setting, tensor: torch.Tensor) -> None:
        """Take one layer's number, [1]. Raises `UserError` if it is not finite (JSON has no such numbers)."""
        value = float(tensor)  # a double holds every float32 exactly
        if not math.isfinite(value):
            raise UserError(f"{mapping.mcore} is {value}: calibrate the threshold before the export")
        self._values.setdefault(mapping.key, []).append(value)

    def entries(self) -> dict[str, float | list[float]]:
        """Keys of config.json: one number where all layers agree, else one per MoE layer."""
        return {key: values[0] if len(set(values)) == 1 else values for key, values in self._values.items()}


_NATIVE_TYPES = {other: model.MODEL_TYPES[0] for model in MODELS for other in model.MODEL_TYPES[1:]}
_DYNAMIC = dict(model.ARCHITECTURES for model in MODELS)
_MODELING_FILES = {model.ARCHITECTURES[1]: model.MODELING_FILE for model in MODELS}
_SHARED_FILES = ("zero_expert_model.py", "zero_expert_routing.py")
"""What all modeling files import."""
_TYPE_KEYS = ("dtype", "torch_dtype")
_DIALS = {"zce_logit_bias": False, "zce_batch_margin": True}
"""Dials of serving, not of the weights, and whether they belong to paired zero experts."""
_ADAPTED = "zce_adapted_steps"
"""Steps that the weights have been distilled for, in an export of ours."""
_ZERO_KEYS = ("zce_nums", "zce_types", "use_zce_mask", *_DIALS, _ADAPTED, *PAIRED_KEYS)
_SIDE_FILES = (
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.tiktoken",
    "sentencepiece*",
    "LICENSE*",
    "additional_chat_templates/*.jinja",
)
_SIDE_SUFFIXES = ("", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".md")
"""Data and texts: a `tokenizer.py` stays behind. Mistral adds a version, `tokenizer.model.v3`."""
_CODE_KEYS = {
    "auto_map",
    "custom_pipelines",
    "custom_generate",
    "trust_remote_code",
    *(f"{mark}{kind}_implementation" for mark in ("", "_") for kind in ("attn", "experts")),
}
"""Keys by which transformers finds Python files, of the folder or of the Hub, to run them."""
_OF_OTHER_WEIGHTS = ("quantization_config", "transformers_weights")
"""What is said of the weights beside the config does not hold for those that we write."""


def zero_experts_of(config: dict[str, Any]) -> ZeroExpertConfig:
    """Zero experts that a Hugging Face config describes; none for a static model.

    Raises:
        UserError: `zce_nums` and `zce_types` disagree, or name a kind we do not have; a wrong `zce_routing`.
    """
    config = text_settings(config)
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
    steps = text_settings(config).get(_ADAPTED, None if zero_experts_of(config).num_zero_experts else 0)
    if steps is not None and not (is_int(steps) and steps >= 0):
        raise UserError(
            f"config.json: {_ADAPTED} {str(steps)[:60]!r} must be a whole number from 0, or be left out"
        )
    return steps


def static_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config without zero experts and without code, with the native model type and architecture."""
    dropped = {*_ZERO_KEYS, *_OF_OTHER_WEIGHTS}
    kept = {key: value for key, value in text_settings(config).items() if key not in dropped}
    result = without_code(with_text_settings(config, kept))
    result = {key: value for key, value in result.items() if key not in dropped}
    kind = config.get("model_type", "")
    result["model_type"] = kind = _NATIVE_TYPES.get(kind, kind)
    native = {name: static for static, name in _DYNAMIC.items()}
    names = config.get("architectures") or [m.ARCHITECTURES[0] for m in MODELS if kind in m.MODEL_TYPES]
    return {**result, "architectures": [native.get(name, name) for name in names]}


def draft_config(config: dict[str, Any]) -> dict[str, Any]:
    """The static config, of a folder whose head of multi-token prediction an engine is to draft with.

    vLLM reads two keys as published, which transformers leaves out when it saves.
    """
    kinds = text_settings(config).get("mlp_layer_types") or []
    asked = {"first_k_dense_replace": list(kinds).count("dense"), "topk_method": "noaux_tc"}
    return asked | static_config(config)


def without_code(value: Any) -> Any:
    """A JSON value without the keys that name code, on any level."""
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if key not in _CODE_KEYS}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def code_of(name: str) -> dict[str, str]:
    """`auto_map` of one of our classes; nothing for a class of transformers."""
    file = _MODELING_FILES.get(name)
    if file is None:
        return {}
    kinds = ["AutoModelForCausalLM"] + ["AutoModelForImageTextToText"] * name.endswith(
        "ConditionalGeneration"
    )
    return dict.fromkeys(kinds, f"{file.removesuffix('.py')}.{name}")


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
        return result if adapted_steps == 0 else _with_keys(result, adapted)
    static_name = (result.get("architectures") or [""])[0]
    name = _DYNAMIC.get(static_name)
    if name is None:
        raise UserError(f"config.json: architecture {static_name!r} has no form with zero experts")
    if zero.paired:
        more = {"zce_routing": "paired", "zce_score": zero.paired_score, **(settings or {})}
        numbers = {"zce_head_width": zero.paired_head_width, "zce_rank": zero.stand_in_rank}
        more |= {key: value for key, value in numbers.items() if value}
    else:
        more = {}
    had = text_settings(config)
    more |= {key: had[key] for key, paired in _DIALS.items() if paired == zero.paired and key in had}
    result |= {"architectures": [name], "auto_map": code_of(name)}
    ours = {"zce_nums": [zero.num_zero_experts], "zce_types": [zero.zero_experts_type], "use_zce_mask": False}
    return _with_keys(result, ours | more | ({} if adapted_steps is None else adapted))


def _with_keys(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The config with more settings of its language model."""
    return with_text_settings(config, {**text_settings(config), **more})


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config after a conversion with `--dtype` (`keep` changes nothing)."""
    return config if DTYPES[dtype] is None else _named_type(config, DTYPES[dtype])


def with_stored_dtype(config: dict[str, Any], sizes: dict[torch.dtype, int]) -> dict[str, Any]:
    """The config with the type that most bytes of its weights have: loaders with `dtype="auto"` round to what it says.

    Args:
        sizes: bytes of the weights by type. A config that names no type gets none.
    """
    floats = {dtype: size for dtype, size in sizes.items() if dtype.is_floating_point}
    told = [one for part in (config, text_settings(config)) for one in map(part.get, _TYPE_KEYS) if one]
    if not floats or not told:
        return config
    return _named_type(config, max(floats, key=floats.__getitem__))


def _named_type(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Under every name that the config has: transformers prefers one, older versions and engines know the other."""
    name, text = str(dtype).removeprefix("torch."), text_settings(config)
    keys = [key for key in _TYPE_KEYS if key in config] or ["dtype"]
    inner = {key: name for key in _TYPE_KEYS if key in text}
    return {**with_text_settings(config, {**text, **inner}), **dict.fromkeys(keys, name)}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and the modeling files where the config asks for ours; no other code is named."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(with_own_code(config), indent=2) + "\n")
    for file in modeling_files((config.get("architectures") or [""])[0]):
        copy_whole(file, folder / file.name)


def with_own_code(config: dict[str, Any]) -> dict[str, Any]:
    """The config, naming our modeling file if its class is ours, and no other code."""
    ours = code_of((config.get("architectures") or [""])[0])
    return without_code(config) | ({"auto_map": ours} if ours else {})


def modeling_files(name: str) -> list[Path]:
    """The Python files that travel with a model of this class; none for a class of transformers."""
    file = _MODELING_FILES.get(name)
    serving = Path(__file__).parents[1] / "serving" / "transformers"
    return [serving / name for name in (file, *_SHARED_FILES)] if file is not None else []


def side_files(source: Path) -> list[Path]:
    """Tokenizer, generation config, chat templates and licence.

    Raises:
        UserError: a link out of the folder, or something that is no regular file.
    """
    found = []
    for path in sorted({path for pattern in _SIDE_FILES for path in source.glob(pattern)}):
        if path.is_dir() or not (path.suffix in _SIDE_SUFFIXES or re.fullmatch(r"\.v\d+", path.suffix)):
            continue
        if is_regular(path):
            found.append(own_file(path.parent, path.name, source, source))
    return found


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy `side_files`, those that name code without it; returns the names."""
    found = side_files(source)
    for path in found:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        clean = _cleaned(path)
        if clean is None:
            copy_whole(path, copy)
        else:
            write_atomically(copy, json.dumps(clean, indent=2, ensure_ascii=False) + "\n")
    return [path.name for path in found]


def _cleaned(path: Path) -> dict[str, Any] | None:
    """A JSON file without the keys that name code; None for a file without them, which keeps its bytes."""
    if not path.name.endswith("config.json"):
        return None
    value = read_json(path)
    clean = without_code(value)
    return None if clean == value else clean


def describe_checkpoint(root: Path, source: Path, facts: ModelFacts) -> None:
    """Put beside a Megatron checkpoint what export and evaluation need, as the converter does: `hf_config/` (config and
    tokenizer of the folder `source`) and `zeda.json`."""
    copy_side_files(source, root / HF_CONFIG_NAME)
    write_config(root / HF_CONFIG_NAME, static_config(read_json(source / "config.json")))
    write_atomically(root / ZEDA_NAME, facts.text())
