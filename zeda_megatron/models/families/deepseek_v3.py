"""DeepSeek-V3, R1, V3.1, Kimi-K2 (text) and Moonlight-16B (deepseek_v3): config and weights, Hugging Face's and
Megatron's.

Latent attention, also under YaRN; sigmoid scores, top-k by score + bias out of the best groups of experts; shared
experts, dense first layers.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import IGNORED, LATENT_PROJECTIONS, SCORE_BIAS, TIED, WeightMap, decoder, shared_expert
from .config_fields import (
    decoder_fields,
    first_dense,
    group_refusal,
    latent_fields,
    latent_refusal,
    shared_expert_fields,
    sigmoid_refusal,
    sigmoid_router_fields,
)

ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV3PlusPlusForCausalLM")
MODEL_TYPES = ("deepseek_v3", "deepseek_v3_plus_plus", "kimi_k2")
MODELING_FILE = "modeling_deepseek_v3_zero.py"
REQUIRED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}
"""What the config must say, or have as its class's default; the published models have no other."""
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads q_lora_rank "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok n_shared_experts "
    "routed_scaling_factor n_group topk_group first_k_dense_replace"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's latent attention or router would not follow, in words; None if nothing."""
    return latent_refusal(hf) or sigmoid_refusal(hf) or group_refusal(hf, hf.n_routed_experts, best=2)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `MLATransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **latent_fields(hf),
        **sigmoid_router_fields(hf.num_experts_per_tok, hf.routed_scaling_factor, hf.n_group, hf.topk_group),
        **shared_expert_fields(hf),
        "moe_layer_freq": first_dense(hf),
    }


WEIGHTS = WeightMap(
    mappings=(*decoder(), *LATENT_PROJECTIONS, SCORE_BIAS, *shared_expert()),
    tied=TIED,
    ignored=IGNORED,
)
