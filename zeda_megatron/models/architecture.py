"""What the rest of the project knows of a model: read from an HF config, one registry word per architecture."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..strict_json import strict_loads
from . import glm4_moe_lite, mixtral, qwen3_moe
from .config_values import check_config_values
from .weight_map import WeightMap


class ModelFile(Protocol):
    """What the file of an architecture defines."""

    ARCHITECTURES: tuple[str, str]
    """HF class of the static and of the dynamic model."""
    MODEL_TYPES: tuple[str, str]
    """`model_type` of transformers, and the one with zero experts that some published folders have."""
    MODELING_FILE: str
    """File of the dynamic model for transformers, in `serving/`; travels with exports."""
    REQUIRED: dict[str, Any]
    """Config keys that must have this value where they are given."""
    WEIGHTS: WeightMap
    """Hugging Face names <-> Megatron names."""

    def refusal(hf: dict[str, Any]) -> str | None:
        """What else of an HF config would not be followed, in words; None if nothing."""

    def transformer_config_kwargs(hf: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of Megatron's `TransformerConfig` (`MLATransformerConfig` for latent attention)."""


MODELS: tuple[ModelFile, ...] = (qwen3_moe, glm4_moe_lite, mixtral)
REGISTRY = {name: model for model in MODELS for name in model.ARCHITECTURES}
MODEL_TYPES = {name: model for model in MODELS for name in model.MODEL_TYPES}


@dataclass(frozen=True)
class Architecture:
    """A model's geometry."""

    name: str
    """HF architecture class, e.g. `Qwen3MoeForCausalLM`."""
    hf: dict[str, Any] = field(repr=False)
    """The whole HF config."""
    megatron: dict[str, Any] = field(repr=False)
    """Keyword arguments of Megatron's `TransformerConfig`."""
    vocab_size: int
    """Rows of the embedding."""
    rotary_base: float
    """Base of the rotary embedding."""
    max_position_embeddings: int
    """Longest sequence the model was made for."""
    tie_word_embeddings: bool
    """LM head = embedding."""
    num_zero_experts: int
    """Zero experts already in the checkpoint (`zce_nums`), 0 for a static model."""

    def is_carried(self, key: str) -> bool:
        """True for an HF tensor behind the decoder's layers (multi-token prediction): conversions carry it along."""
        layers, more = self.hf["num_hidden_layers"], self.hf.get("num_nextn_predict_layers") or 0
        match = re.match(r"model\.layers\.(\d+)\.", key)
        return match is not None and layers <= int(match[1]) < layers + more


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of an HF folder as a dict. Raises `UserError` naming the file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder of a Hugging Face model")
    try:
        return strict_loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_architecture(source: str | Path | dict[str, Any], where: str = "config") -> Architecture:
    """Read an HF folder, or an already loaded config dict, which messages call `where`.

    Raises `UserError` for unknown architectures, for values of a wrong type and for settings
    that the Megatron model would not follow.
    """
    where = where if isinstance(source, dict) else str(Path(source) / "config.json")
    hf = source if isinstance(source, dict) else read_hf_config(source)
    check_config_values(hf, where)
    name = (hf.get("architectures") or [""])[0]
    model = REGISTRY.get(name) or (MODEL_TYPES.get(hf.get("model_type", "")) if not name else None)
    if model is None:
        raise UserError(
            f"{where}: architecture {name or hf.get('model_type')!r} is unknown; known: {', '.join(REGISTRY)}"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(
            f"{where}: rope_type {rope.get('rope_type') or rope.get('type')!r} is not supported, only 'default'"
        )
    for key, value in model.REQUIRED.items():
        if hf.get(key, value) != value:
            raise UserError(f"{where}: {key} {hf[key]!r} is not supported, only {value!r}")
    try:
        megatron = model.transformer_config_kwargs(hf)
        vocab = hf["vocab_size"]
        refusal = model.refusal(hf)
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from None
    if refusal:
        raise UserError(f"{where}: {refusal}")
    if megatron["moe_router_topk"] > megatron["num_moe_experts"]:
        raise UserError(
            f"{where}: num_experts_per_tok {megatron['moe_router_topk']} is larger than num_experts "
            f"{megatron['num_moe_experts']}"
        )
    return Architecture(
        name=name or model.ARCHITECTURES[0],
        hf=hf,
        megatron=megatron,
        vocab_size=vocab,
        rotary_base=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        max_position_embeddings=hf.get("max_position_embeddings", 4096),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        num_zero_experts=sum(hf.get("zce_nums") or [0]) if "PlusPlus" in name or hf.get("zce_nums") else 0,
    )
