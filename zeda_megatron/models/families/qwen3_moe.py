"""Qwen3-MoE (30B-A3B, 235B-A22B, ...): config and weights, Hugging Face's and Megatron's.

Grouped-query attention with norms on queries and keys; dense layers where the config has them.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import IGNORED, QK_NORMS, QKV_PROJECTIONS, TIED, WeightMap, decoder
from .config_fields import (
    decoder_fields,
    every_few_sparse,
    grouped_query_fields,
    softmax_refusal,
    softmax_router_fields,
)

ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen3MoePlusPlusForCausalLM")
MODEL_TYPES = ("qwen3_moe", "qwen3_moe_plus_plus")
MODELING_FILE = "modeling_qwen3_moe_zero.py"
REQUIRED = {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
"""What the config must say, or have as its class's default; no published model has another."""
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads num_experts num_experts_per_tok"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's router would not follow, in words; None if nothing."""
    if getattr(hf, "head_dim", 0) is None:
        return "head_dim null is not supported, nor by transformers: leave the key out or give a number"
    return softmax_refusal(hf.num_experts_per_tok, hf.norm_topk_prob)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        # norm_topk_prob: softmax over all, then renormalised over the K picks = softmax over the picks.
        **softmax_router_fields(hf.num_experts_per_tok, over_picks=hf.norm_topk_prob),
        "qk_layernorm": True,
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_layer_freq": every_few_sparse(hf),
    }


WEIGHTS = WeightMap(mappings=(*decoder(), *QKV_PROJECTIONS, *QK_NORMS), tied=TIED, ignored=IGNORED)
