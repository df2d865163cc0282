"""Mixtral (8x7B, 8x22B): config and weights, Hugging Face's and Megatron's.

Grouped-query attention, every layer a MoE layer, softmax over the K best.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import IGNORED, QKV_PROJECTIONS, TIED, WeightMap, decoder
from .config_fields import decoder_fields, grouped_query_fields, softmax_refusal, softmax_router_fields

ARCHITECTURES = ("MixtralForCausalLM", "MixtralPlusPlusForCausalLM")
MODEL_TYPES = ("mixtral", "mixtral_plus_plus")
MODELING_FILE = "modeling_mixtral_zero.py"
REQUIRED = {"hidden_act": "silu", "sliding_window": None, "router_jitter_noise": 0.0}
"""What the config must say, or have as its class's default; the first published 8x7B had a window of 4,096 in its
config, which its authors took back."""
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_local_experts "
    "num_experts_per_tok"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's router would not follow, in words; None if nothing."""
    return softmax_refusal(hf.num_experts_per_tok, over_picks=True)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        # Softmax over all, renormalised over the K picks = softmax over the picks.
        **softmax_router_fields(hf.num_experts_per_tok, over_picks=True),
        "num_moe_experts": hf.num_local_experts,
        "moe_ffn_hidden_size": hf.intermediate_size,
        "moe_layer_freq": [1] * hf.num_hidden_layers,
    }


WEIGHTS = WeightMap(
    mappings=(*decoder("block_sparse_moe", gate="w1", up="w3", down="w2"), *QKV_PROJECTIONS),
    tied=TIED,
    ignored=IGNORED,
)
