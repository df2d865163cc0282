"""Mixtral (8x7B, 8x22B): config and weights, Hugging Face's and Megatron's.

Grouped-query attention, every layer a MoE layer, softmax over the K best.
"""

from __future__ import annotations

from typing import Any

import torch

from .common_weights import IGNORED, QKV_PROJECTIONS, TIED, decoder
from .weight_map import WeightMap

ARCHITECTURES = ("MixtralForCausalLM", "MixtralPlusPlusForCausalLM")
MODEL_TYPES = ("mixtral", "mixtral_plus_plus")
MODELING_FILE = "modeling_mixtral_zero.py"
REQUIRED = {"hidden_act": "silu", "sliding_window": None, "router_jitter_noise": 0.0}
"""Config keys that must have this value where they are given; the first published 8x7B had a window of 4,096 in its
config, which its authors took back."""


def refusal(hf: dict[str, Any]) -> str | None:
    """What else would keep Megatron from following this config."""
    if hf.get("num_experts_per_tok") == 1:
        return "num_experts_per_tok 1 is not supported: Megatron normalises 2 or more scores"
    return None


def transformer_config_kwargs(hf: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for an HF `config.json` (as a dict)."""
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-5),
        "qk_layernorm": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "num_moe_experts": hf["num_local_experts"],
        "moe_ffn_hidden_size": hf["intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        # Softmax over all, renormalised over the K picks = softmax over the picks.
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": [1] * hf["num_hidden_layers"],
        "init_method_std": hf.get("initializer_range", 0.02),
    }


WEIGHTS = WeightMap(
    mappings=(*decoder("block_sparse_moe", gate="w1", up="w3", down="w2"), *QKV_PROJECTIONS),
    tied=TIED,
    ignored=IGNORED,
)
