"""Qwen3-MoE (30B-A3B, 235B-A22B, ...): config and weights, Hugging Face's and Megatron's.

Grouped-query attention with norms on queries and keys; dense layers where the config has them.
"""

from __future__ import annotations

from typing import Any

import torch

from .common_weights import HF, IGNORED, MC, QKV_PROJECTIONS, TIED, decoder
from .weight_kinds import Direct
from .weight_map import WeightMap

ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen3MoePlusPlusForCausalLM")
MODEL_TYPES = ("qwen3_moe", "qwen3_moe_plus_plus")
MODELING_FILE = "modeling_qwen3_moe_zero.py"
REQUIRED = {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
"""Config keys that must have this value where they are given; no published model has another."""


def refusal(hf: dict[str, Any]) -> str | None:
    """What else would keep Megatron from following this config."""
    if hf.get("num_experts_per_tok") == 1 and hf.get("norm_topk_prob", False):
        return (
            "num_experts_per_tok 1 with norm_topk_prob is not supported: Megatron normalises 2 or more scores"
        )
    return None


def transformer_config_kwargs(hf: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for an HF `config.json` (as a dict)."""
    layers, step = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1)
    dense = set(hf.get("mlp_only_layers") or [])
    sparse = [int(i not in dense and (i + 1) % step == 0) for i in range(layers)]
    return {
        "num_layers": layers,
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf.get("attention_dropout", 0.0),
        # transformers 5 writes the second name.
        "num_moe_experts": hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        # norm_topk_prob: softmax over all, then renormalised over the K picks = softmax over the picks.
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        "moe_router_score_function": "softmax",
        "moe_layer_freq": sparse,
        "init_method_std": hf.get("initializer_range", 0.02),
    }


WEIGHTS = WeightMap(
    mappings=(
        *decoder(),
        *QKV_PROJECTIONS,
        Direct(HF + "self_attn.q_norm.weight", MC + "self_attention.q_layernorm.weight"),
        Direct(HF + "self_attn.k_norm.weight", MC + "self_attention.k_layernorm.weight"),
    ),
    tied=TIED,
    ignored=IGNORED,
)
