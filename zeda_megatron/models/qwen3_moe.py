"""Qwen3-MoE (30B-A3B, 235B-A22B, ...): config and weights, Hugging Face's and Megatron's.

Grouped-query attention with norms on queries and keys; dense layers where the config has them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from .weight_kinds import Direct
from .weight_map import HF, IGNORED, MC, QKV_PROJECTIONS, TIED, WeightMap, decoder

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
    if hf.norm_topk_prob and hf.num_experts_per_tok < 2:
        return "num_experts_per_tok 1 with norm_topk_prob is not supported: every pick would weigh 1"
    if getattr(hf, "head_dim", 0) is None:
        return "head_dim null is not supported, nor by transformers: leave the key out or give a number"
    return None


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    dense, step = set(hf.mlp_only_layers), hf.decoder_sparse_step
    sparse = [int(i not in dense and (i + 1) % step == 0) for i in range(hf.num_hidden_layers)]
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", hf.hidden_size // hf.num_attention_heads),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf.attention_dropout,
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        # norm_topk_prob: softmax over all, then renormalised over the K picks = softmax over the picks.
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": sparse,
        "init_method_std": hf.initializer_range,
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
