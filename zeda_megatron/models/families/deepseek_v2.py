"""DeepSeek-V2 and V2-Lite (deepseek_v2): config and weights, Hugging Face's and Megatron's.

Latent attention under YaRN; softmax over all experts without renormalising, the K best of all or of the groups with the
best experts; shared experts, dense first layers.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..weight_map import IGNORED, LATENT_PROJECTIONS, TIED, WeightMap, decoder, shared_expert
from .config_fields import (
    decoder_fields,
    first_dense,
    group_fields,
    group_refusal,
    latent_fields,
    latent_refusal,
    shared_expert_fields,
    softmax_router_fields,
)

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV2PlusPlusForCausalLM")
MODEL_TYPES = ("deepseek_v2", "deepseek_v2_plus_plus")
MODELING_FILE = "modeling_deepseek_v2_zero.py"
REQUIRED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
}
"""What the config must say, or have as its class's default; the published models have no other. transformers takes no
notice of `norm_topk_prob`."""
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads q_lora_rank "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok n_shared_experts "
    "routed_scaling_factor topk_method first_k_dense_replace"
).split()
"""Keys that a config must give: a default would be the size of another model."""
_METHODS = ("greedy", "group_limited_greedy")


def refusal(hf: PreTrainedConfig) -> str | None:
    """What Megatron's latent attention or router would not follow, in words; None if nothing."""
    if (reason := latent_refusal(hf)) is not None:
        return reason
    if hf.topk_method not in _METHODS:
        return f"topk_method {hf.topk_method!r} is unknown; known: {', '.join(_METHODS)}"
    return group_refusal(hf, hf.n_routed_experts, best=1) if _limited(hf) else None


def _limited(hf: PreTrainedConfig) -> bool:
    return hf.topk_method == "group_limited_greedy"


def transformer_config_kwargs(hf: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's `MLATransformerConfig` for the config as transformers reads it."""
    return {
        **decoder_fields(hf),
        **latent_fields(hf),
        **softmax_router_fields(hf.num_experts_per_tok, over_picks=False),
        **(group_fields(hf.n_group or 1, hf.topk_group or 1, best=1) if _limited(hf) else {}),
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        **shared_expert_fields(hf),
        "moe_layer_freq": first_dense(hf),
    }


WEIGHTS = WeightMap(
    mappings=(*decoder(), *LATENT_PROJECTIONS, *shared_expert()),
    tied=TIED,
    ignored=IGNORED,
)
