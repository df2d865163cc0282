"""GLM-4.7-Flash (glm4_moe_lite): weight map. Latent attention, shared experts, score bias.

The last rows of `kv_a_proj_with_mqa` are the rotary part of the keys, on both sides.
"""

from __future__ import annotations

from .common_weights import COMMON, HF, IGNORED, MC, TIED
from .weight_map import Direct, GateUp, ScoreBias, WeightMap

_ATTENTION = {
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
}

GLM4_MOE_LITE_WEIGHTS = WeightMap(
    mappings=(
        *COMMON,
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
