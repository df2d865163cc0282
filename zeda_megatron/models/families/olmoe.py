"""OLMoE (1B-7B): config and weights, Hugging Face's and Megatron's.

Multi-head attention with norms of queries and keys over all heads; softmax over all experts, not renormalised.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import IGNORED, QK_NORMS, QKV_PROJECTIONS, TIED, WeightMap, decoder
from .config_fields import (
    decoder_fields,
    grouped_query_fields,
    softmax_refusal,
    softmax_router_fields,
)

ARCHITECTURES = ("OlmoeForCausalLM", "OlmoePlusPlusForCausalLM")
MODEL_TYPES = ("olmoe", "olmoe_plus_plus")
MODELING_FILE = "modeling_olmoe_zero.py"
REQUIRED = {"attention_bias": False, "hidden_act": "silu", "clip_qkv": None}
"""What the config must say, or have as its class's default; the published models have no other."""
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_experts num_experts_per_tok"
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
        "qk_norm_over_heads": True,
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.intermediate_size,
        "moe_layer_freq": [1] * hf.num_hidden_layers,
    }


WEIGHTS = WeightMap(mappings=(*decoder(), *QKV_PROJECTIONS, *QK_NORMS), tied=TIED, ignored=IGNORED)
