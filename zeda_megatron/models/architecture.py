"""What the rest of the project knows of a model: read from an HF config, one registry word per architecture."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import UserError
from ..regular_file import refuse_odd_files
from ..strict_json import read_json
from .config_values import TEXT, check_config_values, text_settings
from .families import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_5_moe_text,
    qwen3_moe,
    qwen3_next,
)
from .rotary import Rotary, read_rotary
from .weight_kinds import DeltaDims, ModelDims
from .weight_map import PublishedNames, WeightMap


class ModelFile(Protocol):
    """What the file of an architecture defines."""

    ARCHITECTURES: tuple[str, str]
    """HF class of the static and of the dynamic model."""
    MODEL_TYPES: tuple[str, ...]
    """`model_type` of transformers, the one with zero experts that some published folders have, and what else folders
    of the same model say; exports say the first."""
    MODELING_FILE: str
    """File of the dynamic model for transformers, in `serving/transformers/`; travels with exports."""
    REQUIRED: dict[str, Any]
    """What the config must say, or have as its class's default."""
    SIZES: list[str]
    """Keys that a config must give."""
    WEIGHTS: WeightMap
    """Hugging Face names <-> Megatron names."""

    def refusal(hf: PreTrainedConfig) -> str | None:
        """What else of a config, as transformers reads it, would not be followed, in words; None if nothing."""

    def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
        """Keyword arguments of Megatron's `TransformerConfig` (`MLATransformerConfig` for latent attention)."""


MODELS: tuple[ModelFile, ...] = (
    *(
        qwen3_moe,
        glm4_moe_lite,
        mixtral,
        glm4_moe,
        deepseek_v3,
        deepseek_v2,
        gpt_oss,
        minimax_m2,
        olmoe,
        qwen2_moe,
        qwen3_next,
        qwen3_5_moe_text,
        qwen3_5_moe,
    ),
)
REGISTRY = {name: model for model in MODELS for name in model.ARCHITECTURES}
MODEL_TYPES = {name: model for model in MODELS for name in model.MODEL_TYPES}


@dataclass(frozen=True)
class Architecture:
    """A model's geometry."""

    name: str
    """HF architecture class, e.g. `Qwen3MoeForCausalLM`."""
    hf: dict[str, Any] = field(repr=False)
    """The whole config.json, as it was written; what it leaves out is not in here."""
    megatron: dict[str, Any] = field(repr=False)
    """Keyword arguments of Megatron's `TransformerConfig`."""
    vocab_size: int
    """Rows of the embedding."""
    rotary: Rotary
    """The rotary embedding."""
    max_position_embeddings: int
    """Longest sequence the model was made for."""
    tie_word_embeddings: bool
    """LM head = embedding."""
    num_zero_experts: int
    """Zero experts already in the checkpoint (`zce_nums`), 0 for a static model."""
    mtp_layers: int = 0
    """Heads of multi-token prediction that the Megatron model builds (`with_mtp_head`)."""

    def with_mtp_head(self, flag: str) -> Architecture:
        """The same model, with its head of multi-token prediction built.

        Raises `UserError` that begins with `flag` for a model that has none, or more than one.
        """
        heads = self.published_heads
        if heads != 1:
            raise UserError(
                f"{flag}: config.json says num_nextn_predict_layers {heads}, but a model with one head of multi-token "
                "prediction is needed"
            )
        return replace(self, mtp_layers=heads)

    @property
    def published_heads(self) -> int:
        """Heads of multi-token prediction behind the decoder's layers, by `num_nextn_predict_layers`."""
        return text_settings(self.hf).get("num_nextn_predict_layers") or 0

    @property
    def published(self) -> PublishedNames:
        """What published folders call their tensors."""
        return published_names(self.hf)

    def without_mtp_head(self) -> Architecture:
        """The same model, its head not built: the decoder alone."""
        return replace(self, mtp_layers=0)

    def is_carried(self, key: str) -> bool:
        """True for an HF tensor of which no Megatron parameter is made: conversions carry it along. It is behind the
        decoder's layers (multi-token prediction), or no part of the text model."""
        if self.published.is_aside(key):
            return True
        if self.mtp_layers:
            return False
        layers = self.megatron["num_layers"]
        match = re.match(r"model\.layers\.(\d+)\.", key)
        return match is not None and layers <= int(match[1]) < layers + self.published_heads


def published_names(config: dict[str, Any]) -> PublishedNames:
    """What folders of a config's family call their tensors; plain names for a model that nobody knows."""
    names, kind = config.get("architectures"), config.get("model_type")
    name = names[0] if isinstance(names, list) and names else None
    known = [
        table[word]
        for table, word in ((REGISTRY, name), (MODEL_TYPES, kind))
        if isinstance(word, str) and word in table
    ]
    return known[0].WEIGHTS.published if known else PublishedNames()


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of an HF folder as a dict.

    Raises:
        UserError: naming the file; also for a pipe or a device among the folder's files, which some library would
            open sooner or later.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{path} is missing: give the folder of a Hugging Face model")
    refuse_odd_files(path.parent)
    return read_json(path)


def read_architecture(source: str | Path | dict[str, Any], where: str = "config") -> Architecture:
    """Read an HF folder, or an already loaded config dict, which messages call `where`.

    Every value is the one that transformers' own config class has: its defaults for keys that are left out, its
    precedence where several keys say the same thing.

    Raises `UserError` for unknown architectures, for values of a wrong type and for settings
    that the Megatron model would not follow.
    """
    where = where if isinstance(source, dict) else str(Path(source) / "config.json")
    hf = source if isinstance(source, dict) else read_hf_config(source)
    check_config_values(hf, where)
    name = (hf.get("architectures") or [""])[0]
    model = _model_of(name, hf.get("model_type"), where)
    whole = _as_transformers_reads(hf, model, where)
    theirs = whole.get_text_config()
    for key, value in model.REQUIRED.items():
        if getattr(theirs, key, value) != value:
            raise UserError(f"{where}: {key} {getattr(theirs, key)!r} is not supported, only {value!r}")
    refusal = model.refusal(theirs)
    if refusal:
        raise UserError(f"{where}: {refusal}")
    megatron = model.transformer_config_kwargs(theirs)
    channels = megatron.get("qk_pos_emb_head_dim") or megatron["kv_channels"]
    rotary = read_rotary(theirs, channels, megatron.get("partial_rotary", False))
    if isinstance(rotary, str):
        key = next((key for key in ("rope_scaling", "rope_parameters") if hf.get(key)), "config")
        raise UserError(f"{where}: {key}: {rotary}")
    if megatron["moe_router_topk"] > megatron["num_moe_experts"]:
        raise UserError(
            f"{where}: num_experts_per_tok {megatron['moe_router_topk']} is larger than num_experts "
            f"{megatron['num_moe_experts']}"
        )
    if not any(megatron["moe_layer_freq"]):
        raise UserError(f"{where}: all layers are dense; a Mixture-of-Experts model is needed")
    return Architecture(
        name=name or model.ARCHITECTURES[0],
        hf=hf,
        megatron=megatron,
        vocab_size=theirs.vocab_size,
        rotary=rotary,
        max_position_embeddings=theirs.max_position_embeddings,
        tie_word_embeddings=whole.tie_word_embeddings,
        num_zero_experts=sum(text_settings(hf).get("zce_nums") or [0]),
    )


def _model_of(name: str, kind: str | None, where: str) -> ModelFile:
    """The model's file. `architectures` and `model_type` must mean the same: transformers goes by the second."""
    model = REGISTRY.get(name) or (MODEL_TYPES.get(kind or "") if not name else None)
    if model is None:
        raise UserError(
            f"{where}: architecture {str(name or kind)[:60]!r} is unknown; known: {', '.join(REGISTRY)}"
        )
    if kind is None:
        raise UserError(f"{where}: model_type is missing; for {name} it is {model.MODEL_TYPES[0]!r}")
    if MODEL_TYPES.get(kind) is not model:
        raise UserError(
            f"{where}: model_type {kind[:60]!r} does not belong to architecture {name}, but "
            f"{model.MODEL_TYPES[0]!r} does; transformers goes by the first, so one of the two is wrong"
        )
    return model


def _as_transformers_reads(hf: dict[str, Any], model: ModelFile, where: str) -> PreTrainedConfig:
    """The config as an object of transformers' class. Nothing that `hf` names is loaded or run."""
    kind, text = CONFIG_MAPPING[model.MODEL_TYPES[0]], text_settings(hf)
    _check_keys(text, _text_class(hf, model, where), where if text is hf else f"{where}: {TEXT}", model.SIZES)
    if text is not hf:
        _check_keys(hf, kind, where)
    fields = {key: value for key, value in hf.items() if not key.startswith("_")}
    try:
        return kind.from_dict(copy.deepcopy(fields) | {"model_type": model.MODEL_TYPES[0]})
    except (StrictDataclassError, AttributeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: transformers refuses it: {reason or type(error).__name__}") from error


def _text_class(hf: dict[str, Any], model: ModelFile, where: str) -> type[PreTrainedConfig]:
    """transformers' class for the settings of the language model."""
    kind = model.MODEL_TYPES[0]
    inside = TEXT in CONFIG_MAPPING[kind].sub_configs
    if (text_settings(hf) is not hf) != inside:
        raise UserError(
            f"{where}: a config of model_type {kind!r} has {'the' if inside else 'no'} settings of the language model "
            f"in an object {TEXT}"
        )
    if not inside:
        return CONFIG_MAPPING[kind]
    found = hf[TEXT].get("model_type")
    if found != f"{kind}_text":
        raise UserError(f"{where}: {TEXT}: model_type {str(found)[:60]!r} must be '{kind}_text'")
    return CONFIG_MAPPING[found]


def _check_keys(
    hf: dict[str, Any], kind: type[PreTrainedConfig], where: str, wanted: Iterable[str] = ()
) -> None:
    """Refuse settings that are wanted and missing, that say two things, or that are none."""
    names = kind.attribute_map
    missing = [key for key in wanted if not _aliases(key, names) & hf.keys()]
    if missing:
        raise UserError(f"{where}: key {missing[0]!r} is missing")
    for key, other in names.items():
        if key in hf and other in hf and hf[key] != hf[other]:
            raise UserError(
                f"{where}: {key} {str(hf[key])[:40]} and {other} {str(hf[other])[:40]} mean the same; leave one out"
            )
    for key in hf:
        has = getattr(kind, key, None)
        if callable(has) or isinstance(has, dict) or (isinstance(has, property) and has.fset is None):
            raise UserError(f"{where}: {key[:60]!r} is not a setting; transformers cannot read it either")


def _aliases(key: str, names: dict[str, str]) -> set[str]:
    return {key, *(one for pair in names.items() if key in pair for one in pair)}


def weight_map_of(arch: Architecture) -> WeightMap:
    """The map of an architecture."""
    weights = REGISTRY[arch.name].WEIGHTS
    if not arch.mtp_layers:
        return weights
    return weights.with_mtp_head(arch.megatron["num_layers"], arch.tie_word_embeddings)


def dims_of(arch: Architecture, seed: int = 0, paired: bool = False) -> ModelDims:
    """What the mappings need to know besides names and shapes. `paired`: the model has paired zero experts."""
    return ModelDims(
        num_query_groups=arch.megatron.get("num_query_groups") or arch.megatron["num_attention_heads"],
        head_dim=arch.megatron.get("kv_channels") or 0,
        num_real_experts=arch.megatron["num_moe_experts"],
        seed=seed,
        paired=paired,
        delta=_delta_dims(arch.megatron) if arch.megatron.get("linear_attention_freq") else None,
    )


def _delta_dims(fields: dict[str, Any]) -> DeltaDims:
    key_heads = fields["linear_num_key_heads"]
    return DeltaDims(
        key_heads,
        fields["linear_key_head_dim"],
        fields["linear_num_value_heads"] // key_heads,
        fields["linear_value_head_dim"],
    )
