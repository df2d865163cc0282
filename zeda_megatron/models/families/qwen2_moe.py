"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): config and weights, Hugging Face's and Megatron's.

Grouped-query attention with biases; softmax over all experts; a shared expert behind a gate of one number; dense layers
where the config has them.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import GATED_SHARED_EXPERT, IGNORED, QKV_PROJECTIONS, TIED, WeightMap, decoder
from .config_fields import (
    decoder_fields,
    every_few_sparse,
    gated_shared_fields,
    grouped_query_fields,
    softmax_refusal,
    softmax_router_fields,
)

ARCHITECTURES = ("Qwen2MoeForCausalLM", "Qwen2MoePlusPlusForCausalLM")
MODEL_TYPES = ("qwen2_moe", "qwen2_moe_plus_plus")
MODELING_FILE = "modeling_qwen2_moe_zero.py"
REQUIRED = {"use_sliding_window": False, "hidden_act": "silu"}
"""What the config must say, or have as its class's default; no published model has another."""
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size shared_expert_intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads num_experts num_experts_per_tok"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's router would not follow, in words; None if nothing."""
    return softmax_refusal(hf.num_experts_per_tok, hf.norm_topk_prob)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        **softmax_router_fields(hf.num_experts_per_tok, over_picks=hf.norm_topk_prob),
        "add_qkv_bias": hf.qkv_bias,
        **gated_shared_fields(hf),
        "moe_layer_freq": every_few_sparse(hf),
    }


WEIGHTS = WeightMap(
    mappings=(
        *decoder(),
        *QKV_PROJECTIONS,
        *GATED_SHARED_EXPERT,
    ),
    tied=TIED,
    ignored=IGNORED,
)
