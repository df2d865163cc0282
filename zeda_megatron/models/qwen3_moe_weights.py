"""Weight map of Qwen3-MoE (30B-A3B, 235B-A22B, ...): tied or untied, dense layers where the config has them."""

from __future__ import annotations

from .common_weights import COMMON, HF, IGNORED, MC, TIED
from .weight_map import QKV, Direct, WeightMap

QWEN3_MOE_WEIGHTS = WeightMap(
    mappings=(
        *COMMON,
        *(
            QKV(
                HF + f"self_attn.q_proj.{kind}",
                HF + f"self_attn.k_proj.{kind}",
                HF + f"self_attn.v_proj.{kind}",
                MC + f"self_attention.linear_qkv.{kind}",
            )
            for kind in ("weight", "bias")
        ),
        Direct(HF + "self_attn.q_norm.weight", MC + "self_attention.q_layernorm.weight"),
        Direct(HF + "self_attn.k_norm.weight", MC + "self_attention.k_layernorm.weight"),
    ),
    tied=TIED,
    ignored=IGNORED,
)
