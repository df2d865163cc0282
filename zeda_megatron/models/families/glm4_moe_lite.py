"""GLM-4.7-Flash (glm4_moe_lite): config and weights, Hugging Face's and Megatron's.

Routing: sigmoid scores, top-k by score + bias, weights = score / sum of the chosen ones, times
`routed_scaling_factor`. A shared expert, dense first layers, latent attention with interleaved rotary embedding.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import IGNORED, LATENT_PROJECTIONS, SCORE_BIAS, TIED, WeightMap, decoder, shared_expert
from .config_fields import (
    decoder_fields,
    latent_fields,
    latent_refusal,
    shared_expert_fields,
    sigmoid_refusal,
    sigmoid_router_fields,
)

ARCHITECTURES = ("Glm4MoeLiteForCausalLM", "Glm4MoeLitePlusPlusForCausalLM")
MODEL_TYPES = ("glm4_moe_lite", "glm4_moe_lite_plus_plus")
MODELING_FILE = "modeling_glm4_moe_lite_zero.py"
REQUIRED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
}
"""What the config must say, or have as its class's default; the published model has no other."""
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads q_lora_rank "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
    "routed_scaling_factor"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's latent attention or router would not follow, in words; None if nothing."""
    reason = latent_refusal(hf) or sigmoid_refusal(hf)
    if reason is not None:
        return reason
    told, kinds = getattr(hf, "first_k_dense_replace", None), hf.mlp_layer_types
    if told is not None and kinds != ["dense"] * told + ["sparse"] * (len(kinds) - told):
        return (
            f"first_k_dense_replace {told}: transformers goes by mlp_layer_types, without which the first layer alone "
            "is dense; make the two agree"
        )
    return None


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `MLATransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **latent_fields(hf),
        **sigmoid_router_fields(hf.num_experts_per_tok, hf.routed_scaling_factor),
        **shared_expert_fields(hf),
        "moe_layer_freq": [int(kind == "sparse") for kind in hf.mlp_layer_types],
    }


WEIGHTS = WeightMap(
    mappings=(*decoder(), *LATENT_PROJECTIONS, SCORE_BIAS, *shared_expert()),
    tied=TIED,
    ignored=IGNORED,
)
