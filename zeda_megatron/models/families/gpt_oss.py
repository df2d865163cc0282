"""gpt-oss (20b, 120b): config and weights, Hugging Face's and Megatron's.

Grouped-query attention with biases, a sink for each head, a window in every other layer, under YaRN; softmax over the
K best logits, which have a bias; experts with biases and a clamped gate.

Folders keep the experts of a layer in one tensor, transposed and with gate and up in turn, often in MXFP4; here, as in
the weights that `convert.published` shows, every expert has tensors of its own. Exports merge them again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..weight_kinds import Direct, GateUp, RowBias
from ..weight_map import (
    HF,
    IGNORED,
    MC,
    QKV_PROJECTIONS,
    TIED,
    TURNS,
    PublishedNames,
    WeightMap,
    decoder,
)
from .config_fields import decoder_fields, grouped_query_fields, softmax_refusal, softmax_router_fields

ARCHITECTURES = ("GptOssForCausalLM", "GptOssPlusPlusForCausalLM")
MODEL_TYPES = ("gpt_oss", "gpt_oss_plus_plus")
MODELING_FILE = "modeling_gpt_oss_zero.py"
REQUIRED = {"hidden_act": "silu", "attention_bias": True, "attention_dropout": 0.0}
"""What the config must say, or have as its class's default; the published models have no other."""
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_local_experts num_experts_per_tok"
).split()
"""Keys that a config must give: a default would be the size of another model."""


_GATE = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
"""What older versions of transformers have in place of keys of the config."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's router would not follow, in words; None if nothing."""
    refused = softmax_refusal(hf.num_experts_per_tok, over_picks=True)
    if refused:
        return refused
    told = getattr(hf, "experts_per_token", hf.num_experts_per_tok)
    if told != hf.num_experts_per_tok:
        return f"experts_per_token {told}: transformers goes by num_experts_per_tok {hf.num_experts_per_tok}"
    for key, usual in _GATE.items():
        if getattr(hf, key, usual) != usual and not hasattr(type(hf), key):
            return f"{key} {getattr(hf, key)}: this version of transformers takes no notice of it"
    if set(hf.layer_types) - {"sliding_attention", "full_attention"}:
        return f"layer_types {str(hf.layer_types)[:60]}: only sliding_attention and full_attention are known"
    if "sliding_attention" in hf.layer_types and (hf.sliding_window or 0) < 1:
        return f"sliding_window {hf.sliding_window} must be a whole number from 1"
    return None


def gate(alpha: float, x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `TransformerConfig` for the config as transformers reads it."""
    windows = [int(kind == "sliding_attention") for kind in hf.layer_types]
    return {
        **decoder_fields(hf),
        **grouped_query_fields(hf),
        **softmax_router_fields(hf.num_experts_per_tok, over_picks=True),
        # Biases of attention, router and experts.
        "add_bias_linear": True,
        "softmax_type": "learnable",
        # transformers counts a token among those that it sees, Megatron does not.
        "window_size": (hf.sliding_window - 1, 0) if any(windows) else None,
        "window_attn_skip_freq": windows,
        "activation_func": partial(gate, getattr(hf, "swiglu_alpha", _GATE["swiglu_alpha"])),
        "activation_func_clamp_value": getattr(hf, "swiglu_limit", _GATE["swiglu_limit"]),
        "glu_linear_offset": 1.0,
        "num_moe_experts": hf.num_local_experts,
        "moe_ffn_hidden_size": hf.intermediate_size,
        "moe_layer_freq": [1] * hf.num_hidden_layers,
    }


_EXPERT = HF + "mlp.experts.{expert}."
_LOCAL = MC + "mlp.experts.local_experts.{expert}."
WEIGHTS = WeightMap(
    mappings=(
        *decoder(router="router"),
        *QKV_PROJECTIONS,
        Direct(HF + "self_attn.o_proj.bias", MC + "self_attention.linear_proj.bias"),
        Direct(HF + "self_attn.sinks", MC + "self_attention.core_attention.softmax_offset"),
        RowBias(HF + "mlp.router.bias", MC + "mlp.router.bias"),
        GateUp(_EXPERT + "gate_proj.bias", _EXPERT + "up_proj.bias", _LOCAL + "linear_fc1.bias"),
        Direct(_EXPERT + "down_proj.bias", _LOCAL + "linear_fc2.bias"),
    ),
    tied=TIED,
    ignored=IGNORED,
    published=PublishedNames(experts=TURNS, writes_fused=True),
)
