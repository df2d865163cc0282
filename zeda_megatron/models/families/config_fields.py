"""Fields of Megatron's `TransformerConfig` that families have in common, from a config as transformers reads it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig


def decoder_fields(hf: PreTrainedConfig) -> dict[str, Any]:
    """Decoder of RMSNorm and SwiGLU without biases; no MoE, no attention."""
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        # A family without dense layers may have no key for their width.
        "ffn_hidden_size": getattr(hf, "intermediate_size", None) or hf.moe_intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf.attention_dropout,
        "init_method_std": hf.initializer_range,
    }


def grouped_query_fields(hf: PreTrainedConfig) -> dict[str, Any]:
    """Grouped-query attention without norms of queries and keys."""
    return {
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "qk_layernorm": False,
    }


def gated_delta_fields(hf: PreTrainedConfig) -> dict[str, Any]:
    """Gated delta networks in the layers that `layer_types` names; the others have attention with an output gate, norms
    of queries and keys, and a part of each head turned. Norms add their weight to 1."""
    return {
        "linear_attention_freq": [int(kind == "linear_attention") for kind in hf.layer_types],
        "linear_conv_kernel_dim": hf.linear_conv_kernel_dim,
        "linear_key_head_dim": hf.linear_key_head_dim,
        "linear_value_head_dim": hf.linear_value_head_dim,
        "linear_num_key_heads": hf.linear_num_key_heads,
        "linear_num_value_heads": hf.linear_num_value_heads,
        "attention_output_gate": True,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "partial_rotary": True,
    }


def gated_delta_refusal(hf: PreTrainedConfig) -> str | None:
    """What is wrong with a config's gated delta networks, in words; None if nothing."""
    kinds, layers = hf.layer_types, hf.num_hidden_layers
    if len(kinds) != layers or not set(kinds) <= {"linear_attention", "full_attention"}:
        return f"layer_types must say linear_attention or full_attention for each of {layers} layers"
    sizes = {key: getattr(hf, key) for key in GATED_DELTA_SIZES}
    wrong = next((key for key, size in sizes.items() if size < 1), None)
    if wrong:
        return f"{wrong} {sizes[wrong]} must be at least 1"
    key_heads, value_heads = hf.linear_num_key_heads, hf.linear_num_value_heads
    if value_heads % key_heads:
        return f"linear_num_value_heads {value_heads} must be a multiple of linear_num_key_heads {key_heads}"
    return None


GATED_DELTA_SIZES = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Keys of config.json."""


def latent_fields(hf: PreTrainedConfig) -> dict[str, Any]:
    """Multi-latent attention. Under YaRN its softmax is scaled by (0.1 m ln s + 1)^2: factor s, `mscale_all_dim` m."""
    rope = hf.rope_parameters
    return {
        "multi_latent_attention": True,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "rotary_scaling_factor": rope.get("factor", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        "qk_layernorm": True,
    }


def latent_refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's latent attention would not follow, in words; None if nothing."""
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
    if heads != kv_heads:
        return f"num_key_value_heads {kv_heads} must equal num_attention_heads {heads} (latent attention)"
    turned = getattr(hf, "head_dim", None) or hf.qk_rope_head_dim
    if turned != hf.qk_rope_head_dim:
        return f"head_dim {turned} must equal qk_rope_head_dim {hf.qk_rope_head_dim} (latent attention), or be left out"
    return None


def softmax_router_fields(top_k: int, over_picks: bool) -> dict[str, Any]:
    """Softmax over the K picks, or over all experts without renormalising."""
    return {
        "moe_router_topk": top_k,
        "moe_router_pre_softmax": not over_picks,
        "moe_router_score_function": "softmax",
    }


def softmax_refusal(top_k: int, over_picks: bool) -> str | None:
    """What Megatron's softmax router would not follow, in words; None if nothing."""
    if over_picks and top_k < 2:
        return (
            f"num_experts_per_tok {top_k} is not supported where weights sum to 1: every pick would weigh 1"
        )
    return None


def sigmoid_refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's sigmoid router would not follow, in words; None if nothing."""
    if hf.num_experts_per_tok < 2:
        return f"num_experts_per_tok {hf.num_experts_per_tok} is not supported: Megatron normalises 2 or more scores"
    return None


def sigmoid_router_fields(top_k: int, scale: float, groups: int = 1, kept_groups: int = 1) -> dict[str, Any]:
    """Sigmoid scores, K best by score + bias, weights = score / sum of the K, times `scale`; from `kept_groups` of
    `groups` groups of experts."""
    return {
        "moe_router_topk": top_k,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
        # The bias chooses and is frozen: with zero experts its updates would work against the group loss.
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": scale,
        **group_fields(groups, kept_groups, best=2),
    }


def group_fields(groups: int, kept: int, best: int) -> dict[str, Any]:
    """A limit to `kept` of `groups` groups, whose score is the sum of their `best` best; nothing where all are kept."""
    if groups == kept:
        return {}
    return {
        "moe_router_num_groups": groups,
        "moe_router_group_topk": kept,
        "moe_router_group_scores": best,
    }


def group_refusal(hf: PreTrainedConfig, experts: int, best: int) -> str | None:
    """What is wrong with a config's groups of experts, in words; None if nothing."""
    groups, kept = hf.n_group or 1, hf.topk_group or 1
    size = experts // groups
    if kept > groups or experts % groups or size < best or kept * size < hf.num_experts_per_tok:
        return (
            f"n_group {groups} and topk_group {kept} do not fit {experts} experts of which a token picks "
            f"{hf.num_experts_per_tok}"
        )
    return None


def shared_expert_fields(hf: PreTrainedConfig) -> dict[str, Any]:
    """Routed experts, and shared ones of their width that are one expert here."""
    return {
        "num_moe_experts": hf.n_routed_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf.moe_intermediate_size * hf.n_shared_experts,
    }


def gated_shared_fields(hf: PreTrainedConfig) -> dict[str, Any]:
    """Routed experts, and a shared one behind a gate of one number."""
    return {
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    }


def every_few_sparse(hf: PreTrainedConfig) -> list[int]:
    """`moe_layer_freq`: every `decoder_sparse_step`th layer has experts, but those that `mlp_only_layers` names."""
    dense, step = set(hf.mlp_only_layers), hf.decoder_sparse_step
    return [int(i not in dense and (i + 1) % step == 0) for i in range(hf.num_hidden_layers)]


def first_dense(hf: PreTrainedConfig) -> list[int]:
    """`moe_layer_freq`: the first layers are dense."""
    dense = min(hf.first_k_dense_replace, hf.num_hidden_layers)
    return [0] * dense + [1] * (hf.num_hidden_layers - dense)
