"""Weight map of each architecture, one line each."""

from __future__ import annotations

from ..errors import UserError
from .architecture import Architecture
from .glm4_moe_lite_weights import GLM4_MOE_LITE_WEIGHTS
from .qwen3_moe_weights import QWEN3_MOE_WEIGHTS
from .weight_map import ModelDims, WeightMap

WEIGHT_MAPS: dict[str, WeightMap] = {
    "Qwen3MoeForCausalLM": QWEN3_MOE_WEIGHTS,
    "Qwen3MoePlusPlusForCausalLM": QWEN3_MOE_WEIGHTS,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE_WEIGHTS,
    "Glm4MoeLitePlusPlusForCausalLM": GLM4_MOE_LITE_WEIGHTS,
}


def weight_map_of(arch: Architecture) -> WeightMap:
    """The map of an architecture; `UserError` if there is none."""
    if arch.name not in WEIGHT_MAPS:
        raise UserError(f"architecture {arch.name!r} cannot be converted; known: {', '.join(WEIGHT_MAPS)}")
    return WEIGHT_MAPS[arch.name]


def dims_of(arch: Architecture, seed: int = 0) -> ModelDims:
    """What the mappings need to know besides names and shapes."""
    return ModelDims(
        num_query_groups=arch.megatron.get("num_query_groups") or arch.megatron["num_attention_heads"],
        head_dim=arch.megatron.get("kv_channels") or 0,
        num_real_experts=arch.megatron["num_moe_experts"],
        seed=seed,
    )
