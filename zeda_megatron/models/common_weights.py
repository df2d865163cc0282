"""Mappings that all architectures share: embedding, norms, router, zero experts, experts, dense MLP.

Disk format: per-expert keys `mlp.experts.{expert}.{gate,up,down}_proj.weight`, as published and as
transformers saves them.
"""

from __future__ import annotations

from .weight_map import Added, Direct, GateUp, Router, Setting

HF = "model.layers.{layer}."
MC = "decoder.layers.{layer}."

COMMON = (
    Direct("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
    Direct("model.norm.weight", "decoder.final_layernorm.weight"),
    Direct("lm_head.weight", "output_layer.weight"),
    Direct(HF + "input_layernorm.weight", MC + "input_layernorm.weight"),
    Direct(HF + "self_attn.o_proj.weight", MC + "self_attention.linear_proj.weight"),
    Direct(HF + "post_attention_layernorm.weight", MC + "pre_mlp_layernorm.weight"),
    # MoE layers
    Router(HF + "mlp.gate.weight", MC + "mlp.router.weight"),
    Added(HF + "mlp.gate.zero_bias", MC + "mlp.router.zero_output.bias"),
    # paired zero experts
    Added(HF + "mlp.gate.zero_weight", MC + "mlp.router.paired.weight"),
    Added(HF + "mlp.gate.zero_bias", MC + "mlp.router.paired.bias"),
    Setting("zce_threshold", "zce_threshold/{layer}", MC + "mlp.router.paired.threshold"),
    GateUp(
        HF + "mlp.experts.{expert}.gate_proj.weight",
        HF + "mlp.experts.{expert}.up_proj.weight",
        MC + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
    ),
    Direct(
        HF + "mlp.experts.{expert}.down_proj.weight",
        MC + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
    ),
    # dense layers
    GateUp(HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight", MC + "mlp.linear_fc1.weight"),
    Direct(HF + "mlp.down_proj.weight", MC + "mlp.linear_fc2.weight"),
)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
