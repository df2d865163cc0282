"""Mappings that architectures share: embedding, norms, attention, router, zero experts, experts, dense MLP.

Disk format: per-expert keys `mlp.experts.{expert}.{gate,up,down}_proj.weight`, as published and as transformers saves
them; some architectures use other words.
"""

from __future__ import annotations

from .weight_kinds import QKV, Added, Direct, GateUp, Router, Setting, WeightMapping

HF = "model.layers.{layer}."
MC = "decoder.layers.{layer}."
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def decoder(
    moe: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[WeightMapping, ...]:
    """Everything but attention's projections. The arguments are Hugging Face's words for a layer's MoE block and for
    the three matrices of a gated MLP."""
    expert = f"{HF}{moe}.experts.{{expert}}."
    local = MC + "mlp.experts.local_experts.{expert}."
    return (
        Direct("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        Direct("model.norm.weight", "decoder.final_layernorm.weight"),
        Direct("lm_head.weight", "output_layer.weight"),
        Direct(HF + "input_layernorm.weight", MC + "input_layernorm.weight"),
        Direct(HF + "self_attn.o_proj.weight", MC + "self_attention.linear_proj.weight"),
        Direct(HF + "post_attention_layernorm.weight", MC + "pre_mlp_layernorm.weight"),
        # MoE layers
        Router(f"{HF}{moe}.gate.weight", MC + "mlp.router.weight"),
        Added(f"{HF}{moe}.gate.zero_bias", MC + "mlp.router.zero_output.bias"),
        # paired zero experts
        Added(f"{HF}{moe}.gate.zero_weight", MC + "mlp.router.paired.weight"),
        Added(f"{HF}{moe}.gate.zero_bias", MC + "mlp.router.paired.bias"),
        Setting("zce_threshold", "zce_threshold/{layer}", MC + "mlp.router.paired.threshold"),
        GateUp(f"{expert}{gate}.weight", f"{expert}{up}.weight", local + "linear_fc1.weight"),
        Direct(f"{expert}{down}.weight", local + "linear_fc2.weight"),
        # dense layers
        GateUp(f"{HF}mlp.{gate}.weight", f"{HF}mlp.{up}.weight", MC + "mlp.linear_fc1.weight"),
        Direct(f"{HF}mlp.{down}.weight", MC + "mlp.linear_fc2.weight"),
    )


QKV_PROJECTIONS = tuple(
    QKV(
        HF + f"self_attn.q_proj.{kind}",
        HF + f"self_attn.k_proj.{kind}",
        HF + f"self_attn.v_proj.{kind}",
        MC + f"self_attention.linear_qkv.{kind}",
    )
    for kind in ("weight", "bias")
)
"""Grouped-query attention."""
