"""Mixtral (8x7B, 8x22B): config and weights, Hugging Face's and Megatron's.

Grouped-query attention, every layer a MoE layer, softmax over the K best.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from .weight_map import IGNORED, QKV_PROJECTIONS, TIED, WeightMap, decoder

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
    if hf.num_experts_per_tok < 2:
        return "num_experts_per_tok 1 is not supported: every pick would weigh 1"
    return None


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": hf.head_dim or hf.hidden_size // hf.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "qk_layernorm": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf.attention_dropout,
        "num_moe_experts": hf.num_local_experts,
        "moe_ffn_hidden_size": hf.intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        # Softmax over all, renormalised over the K picks = softmax over the picks.
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": [1] * hf.num_hidden_layers,
        "init_method_std": hf.initializer_range,
    }


WEIGHTS = WeightMap(
    mappings=(*decoder("block_sparse_moe", gate="w1", up="w3", down="w2"), *QKV_PROJECTIONS),
    tied=TIED,
    ignored=IGNORED,
)
