"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7 (glm4_moe): config and weights, Hugging Face's and Megatron's.

Routing as in GLM-4.7-Flash: sigmoid scores, top-k by score + bias, a shared expert, dense first layers. Grouped-query
attention with biases, norms of queries and keys in the large models, half of each head's channels turned.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import (
    IGNORED,
    QK_NORMS,
    QKV_PROJECTIONS,
    SCORE_BIAS,
    TIED,
    WeightMap,
    decoder,
    shared_expert,
)
from .config_fields import (
    decoder_fields,
    first_dense,
    group_refusal,
    grouped_query_fields,
    shared_expert_fields,
    sigmoid_refusal,
    sigmoid_router_fields,
)

ARCHITECTURES = ("Glm4MoeForCausalLM", "Glm4MoePlusPlusForCausalLM")
MODEL_TYPES = ("glm4_moe", "glm4_moe_plus_plus")
MODELING_FILE = "modeling_glm4_moe_zero.py"
REQUIRED = {"hidden_act": "silu", "norm_topk_prob": True}
"""What the config must say, or have as its class's default; the published models have no other."""
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads n_routed_experts num_experts_per_tok routed_scaling_factor first_k_dense_replace"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's router would not follow, in words; None if nothing."""
    return sigmoid_refusal(hf) or group_refusal(hf, hf.n_routed_experts, best=2)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        **sigmoid_router_fields(hf.num_experts_per_tok, hf.routed_scaling_factor, hf.n_group, hf.topk_group),
        "add_qkv_bias": hf.attention_bias,
        "qk_layernorm": hf.use_qk_norm,
        "partial_rotary": True,
        **shared_expert_fields(hf),
        "moe_layer_freq": first_dense(hf),
    }


WEIGHTS = WeightMap(
    mappings=(*decoder(), *QKV_PROJECTIONS, *QK_NORMS, SCORE_BIAS, *shared_expert()),
    tied=TIED,
    ignored=IGNORED,
)
