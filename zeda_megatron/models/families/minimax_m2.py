"""MiniMax-M2 (M2, M2.1, M2.5, M2.7): config and weights, Hugging Face's and Megatron's.

Grouped-query attention with norms of queries and keys over all heads and a part of each head's channels turned; sigmoid
scores, top-k by score + bias, no shared expert.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_kinds import ScoreBias
from ..weight_map import HF, IGNORED, MC, QK_NORMS, QKV_PROJECTIONS, TIED, WeightMap, decoder
from .config_fields import (
    decoder_fields,
    grouped_query_fields,
    sigmoid_refusal,
    sigmoid_router_fields,
)

ARCHITECTURES = ("MiniMaxM2ForCausalLM", "MiniMaxM2PlusPlusForCausalLM")
MODEL_TYPES = ("minimax_m2", "minimax_m2_plus_plus")
MODELING_FILE = "modeling_minimax_m2_zero.py"
REQUIRED = {
    "hidden_act": "silu",
    "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}
"""What the config must say, or have as its class's default; the published models have no other."""
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_local_experts num_experts_per_tok"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's router would not follow, in words; None if nothing."""
    if (reason := sigmoid_refusal(hf)) is not None:
        return reason
    turned = int(hf.head_dim * hf.rope_parameters.get("partial_rotary_factor", 1.0))
    if getattr(hf, "rotary_dim", turned) not in (turned, None):
        return f"rotary_dim {hf.rotary_dim}: this version of transformers takes no notice of it; 5.19 does"
    kinds = getattr(hf, "attn_type_list", None) or []
    if set(kinds) - {1}:
        return f"attn_type_list {str(kinds)[:40]} is not supported: 1, full attention, in every layer"
    return None


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        **sigmoid_router_fields(hf.num_experts_per_tok, scale=1.0),
        "qk_norm_over_heads": True,
        "partial_rotary": True,
        "num_moe_experts": hf.num_local_experts,
        "moe_ffn_hidden_size": hf.intermediate_size,
        "moe_layer_freq": [1] * hf.num_hidden_layers,
    }


MOE = "block_sparse_moe"
WEIGHTS = WeightMap(
    mappings=(
        *decoder(MOE, gate="w1", up="w3", down="w2"),
        *QKV_PROJECTIONS,
        *QK_NORMS,
        ScoreBias(f"{HF}{MOE}.e_score_correction_bias", MC + "mlp.router.expert_bias"),
    ),
    tied=TIED,
    ignored=IGNORED,
)
