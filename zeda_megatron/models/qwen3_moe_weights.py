"""Weight map of Qwen3-MoE (30B-A3B, 235B-A22B, ...): tied or untied, dense layers where the config has them.

Disk format: per-expert keys `mlp.experts.{expert}.{gate,up,down}_proj.weight`, as published and as
transformers saves them.
"""

from __future__ import annotations

from .weight_map import QKV, Added, Direct, GateUp, Router, Setting, WeightMap

_HF = "model.layers.{layer}."
_MC = "decoder.layers.{layer}."

QWEN3_MOE_WEIGHTS = WeightMap(
    mappings=(
        Direct("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        Direct("model.norm.weight", "decoder.final_layernorm.weight"),
        Direct("lm_head.weight", "output_layer.weight"),
        Direct(_HF + "input_layernorm.weight", _MC + "input_layernorm.weight"),
        *(
            QKV(
                _HF + f"self_attn.q_proj.{kind}",
                _HF + f"self_attn.k_proj.{kind}",
                _HF + f"self_attn.v_proj.{kind}",
                _MC + f"self_attention.linear_qkv.{kind}",
            )
            for kind in ("weight", "bias")
        ),
        Direct(_HF + "self_attn.q_norm.weight", _MC + "self_attention.q_layernorm.weight"),
        Direct(_HF + "self_attn.k_norm.weight", _MC + "self_attention.k_layernorm.weight"),
        Direct(_HF + "self_attn.o_proj.weight", _MC + "self_attention.linear_proj.weight"),
        Direct(_HF + "post_attention_layernorm.weight", _MC + "pre_mlp_layernorm.weight"),
        # MoE layers
        Router(_HF + "mlp.gate.weight", _MC + "mlp.router.weight"),
        Added(_HF + "mlp.gate.zero_bias", _MC + "mlp.router.zero_output.bias"),
        # paired zero experts
        Added(_HF + "mlp.gate.zero_weight", _MC + "mlp.router.paired.weight"),
        Added(_HF + "mlp.gate.zero_bias", _MC + "mlp.router.paired.bias"),
        Setting("zce_threshold", "zce_threshold/{layer}", _MC + "mlp.router.paired.threshold"),
        GateUp(
            _HF + "mlp.experts.{expert}.gate_proj.weight",
            _HF + "mlp.experts.{expert}.up_proj.weight",
            _MC + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        ),
        Direct(
            _HF + "mlp.experts.{expert}.down_proj.weight",
            _MC + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        ),
        # dense layers
        GateUp(_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight", _MC + "mlp.linear_fc1.weight"),
        Direct(_HF + "mlp.down_proj.weight", _MC + "mlp.linear_fc2.weight"),
    ),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
