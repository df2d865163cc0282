"""Qwen3-Next (Qwen3-Next-80B-A3B): config and weights, Hugging Face's and Megatron's.

Three of four layers are gated delta networks; the fourth has grouped-query attention with an output gate, norms of
queries and keys, a quarter of each head's channels turned. All norms but the gated one add their weight to 1. Softmax,
a shared expert behind a gate of one number. The head of multi-token prediction (`mtp.`) is carried along.
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
    every_few_sparse,
    gated_delta_fields,
    gated_delta_refusal,
    gated_shared_fields,
    grouped_query_fields,
    softmax_refusal,
    softmax_router_fields,
)

ARCHITECTURES = ("Qwen3NextForCausalLM", "Qwen3NextPlusPlusForCausalLM")
MODEL_TYPES = ("qwen3_next", "qwen3_next_plus_plus")
MODELING_FILE = "modeling_qwen3_next_zero.py"
REQUIRED = {"attention_bias": False, "hidden_act": "silu"}
"""What the config must say, or have as its class's default; no published model has another."""
SIZES = [
    *"vocab_size hidden_size intermediate_size moe_intermediate_size shared_expert_intermediate_size".split(),
    *"num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts num_experts_per_tok".split(),
    *GATED_DELTA_SIZES,
]
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What the Megatron model would not follow, in words; None if nothing."""
    return softmax_refusal(hf.num_experts_per_tok, hf.norm_topk_prob) or gated_delta_refusal(hf)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        **gated_delta_fields(hf),
        **softmax_router_fields(hf.num_experts_per_tok, over_picks=hf.norm_topk_prob),
        **gated_shared_fields(hf),
        "moe_layer_freq": every_few_sparse(hf),
    }


WEIGHTS = WeightMap(
    mappings=(
        *decoder(),
        GATED_QKV,
        *QK_NORMS,
        *gated_delta("in_proj_qkvz in_proj_ba", "kkvv nn"),
        *GATED_SHARED_EXPERT,
    ),
    tied=TIED,
    published=PublishedNames(may_lack=("mtp.",)),
)
