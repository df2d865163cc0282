"""Qwen3.5 and Qwen3.6, the language model alone: config and weights, Hugging Face's and Megatron's.

As Qwen3-Next, with experts in all layers, weights of picks that sum to 1, and four projections in the gated delta
network where that has two. Positions of three kinds (of a picture's rows and columns) are all the same in text.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import (
    GATED_QKV,
    GATED_SHARED_EXPERT,
    QK_NORMS,
    TIED,
    PublishedNames,
    WeightMap,
    decoder,
    gated_delta,
)
from .config_fields import (
    GATED_DELTA_SIZES,
    decoder_fields,
    gated_delta_fields,
    gated_delta_refusal,
    gated_shared_fields,
    grouped_query_fields,
    softmax_refusal,
    softmax_router_fields,
)

ARCHITECTURES = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoePlusPlusForCausalLM")
MODEL_TYPES = ("qwen3_5_moe_text", "qwen3_5_moe_text_plus_plus")
MODELING_FILE = "modeling_qwen3_5_moe_zero.py"
REQUIRED = {"attention_bias": False, "hidden_act": "silu"}
"""What the config must say, or have as its class's default; no published model has another."""
SIZES = [
    *"vocab_size hidden_size moe_intermediate_size shared_expert_intermediate_size num_hidden_layers".split(),
    *"num_attention_heads num_key_value_heads head_dim num_experts num_experts_per_tok".split(),
    *GATED_DELTA_SIZES,
]
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What the Megatron model would not follow, in words; None if nothing."""
    return softmax_refusal(hf.num_experts_per_tok, over_picks=True) or gated_delta_refusal(hf)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        **gated_delta_fields(hf),
        **softmax_router_fields(hf.num_experts_per_tok, over_picks=True),
        **gated_shared_fields(hf),
        "moe_layer_freq": [1] * hf.num_hidden_layers,
    }


WEIGHTS = WeightMap(
    mappings=(
        *decoder(),
        GATED_QKV,
        *QK_NORMS,
        *gated_delta("in_proj_qkv in_proj_z in_proj_b in_proj_a", "k,k,v v n n"),
        *GATED_SHARED_EXPERT,
    ),
    tied=TIED,
    published=PublishedNames(may_lack=("mtp.",)),
)
