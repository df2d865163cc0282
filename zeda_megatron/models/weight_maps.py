"""The weight map of an architecture and the sizes that its mappings need."""

from __future__ import annotations

from .architecture import REGISTRY, Architecture
from .weight_kinds import ModelDims
from .weight_map import WeightMap


def weight_map_of(arch: Architecture) -> WeightMap:
    """The map of an architecture."""
    return REGISTRY[arch.name].WEIGHTS


def dims_of(arch: Architecture, seed: int = 0, paired: bool = False) -> ModelDims:
    """What the mappings need to know besides names and shapes. `paired`: the model has paired zero experts."""
    return ModelDims(
        num_query_groups=arch.megatron.get("num_query_groups") or arch.megatron["num_attention_heads"],
        head_dim=arch.megatron.get("kv_channels") or 0,
        num_real_experts=arch.megatron["num_moe_experts"],
        seed=seed,
        paired=paired,
    )
