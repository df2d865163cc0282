"""GLM-4.7-Flash (glm4_moe_lite): config and weights, Hugging Face's and Megatron's.

Routing: sigmoid scores, top-k by score + bias, weights = score / sum of the chosen ones, times
`routed_scaling_factor`. A shared expert, dense first layers, latent attention with interleaved rotary embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from .weight_kinds import Direct, GateUp, ScoreBias
from .weight_map import HF, IGNORED, MC, TIED, WeightMap, decoder

ARCHITECTURES = ("Glm4MoeLiteForCausalLM", "Glm4MoeLitePlusPlusForCausalLM")
MODEL_TYPES = ("glm4_moe_lite", "glm4_moe_lite_plus_plus")
MODELING_FILE = "modeling_glm4_moe_lite_zero.py"
REQUIRED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
}
"""What the config must say, or have as its class's default; the published model has no other."""
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads q_lora_rank "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
    "routed_scaling_factor"
).split()
"""Keys that a config must give: a default would be the size of another model."""


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's latent attention or router would not follow, in words; None if nothing."""
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
    if heads != kv_heads:
        return f"num_key_value_heads {kv_heads} must equal num_attention_heads {heads} (latent attention)"
    if hf.num_experts_per_tok < 2:
        return f"num_experts_per_tok {hf.num_experts_per_tok} is not supported: Megatron normalises 2 or more scores"
    if hf.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor must be 1.0"
    told, kinds = getattr(hf, "first_k_dense_replace", None), hf.mlp_layer_types
    if told is not None and kinds != ["dense"] * told + ["sparse"] * (len(kinds) - told):
        return (
            f"first_k_dense_replace {told}: transformers goes by mlp_layer_types, without which the first layer alone "
            "is dense; make the two agree"
        )
    return None


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `MLATransformerConfig` for the config as transformers reads it."""
    return {
        "multi_latent_attention": True,
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "rope_type": "rope",
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf.attention_dropout,
        "num_moe_experts": hf.n_routed_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf.moe_intermediate_size * hf.n_shared_experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
        # The bias chooses and is frozen: with zero experts its updates would work against the group loss.
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        "moe_layer_freq": [int(kind == "sparse") for kind in hf.mlp_layer_types],
        "init_method_std": hf.initializer_range,
    }


_ATTENTION = {
    # The last rows of kv_a_proj_with_mqa are the rotary part of the keys, on both sides.
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
}

WEIGHTS = WeightMap(
    mappings=(
        *decoder(),
        *(
            Direct(f"{HF}self_attn.{hf}.weight", f"{MC}self_attention.{ours}.weight")
            for hf, ours in _ATTENTION.items()
        ),
        ScoreBias(HF + "mlp.gate.e_score_correction_bias", MC + "mlp.router.expert_bias"),
        GateUp(
            HF + "mlp.shared_experts.gate_proj.weight",
            HF + "mlp.shared_experts.up_proj.weight",
            MC + "mlp.shared_experts.linear_fc1.weight",
        ),
        Direct(
            HF + "mlp.shared_experts.down_proj.weight",
            MC + "mlp.shared_experts.linear_fc2.weight",
        ),
    ),
    tied=TIED,
    ignored=IGNORED,
)
