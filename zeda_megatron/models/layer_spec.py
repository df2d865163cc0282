"""The layer spec of a GPT model: Transformer Engine's where it is installed, ours otherwise."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..errors import UserError
from ..runtime.megatron_api import mend_latent_attention, moe_submodules, queries_need_latents
from .latent_attention import LatentAttention
from .local_layers import SDPAttention, SPRMSNorm, with_explicit_masks


def has_transformer_engine() -> bool:
    """Transformer Engine is installed and there is a GPU to use it on."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def decoder_block_spec(
    config, vp_stage: int | None = None, use_te: bool | None = None
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage builds.

    Args:
        config: Megatron's `TransformerConfig` (RMSNorm models).
        use_te: force or forbid Transformer Engine; None decides by `has_transformer_engine`.
    """
    use_te = has_transformer_engine() if use_te is None else use_te
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    if config.multi_latent_attention:
        if config.q_lora_rank is None and queries_need_latents():
            raise UserError(
                "config.json: q_lora_rank null (queries without latents) works with megatron-core 0.16 only: newer "
                "ones put a norm before such queries"
            )
        mend_latent_attention()
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention
            attention.module = LatentAttention
            attention.params = {**attention.params, "whole_down_projections": not use_te}
    if use_te:
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = with_explicit_masks(attention.core_attention)
        return block
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = SPRMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = SDPAttention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) is not IdentityOp:
                setattr(attention, name, SPRMSNorm)
        parts.sharded_state_dict_keys_map = _fused_keys(config, moe_submodules(layer) is None)
    block.layer_norm = SPRMSNorm
    return block


def _fused_keys(config, dense: bool) -> dict[str, str]:
    """Checkpoint keys as Transformer Engine's spec writes them.

    It fuses the input norm into linear_qkv (latent attention: the latents' norms into the up projections, the input
    norm stays), and the norm before a dense MLP into linear_fc1, but not the norm before a MoE layer.
    """
    if config.multi_latent_attention:
        keys = {"self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_"}
        if config.q_lora_rank is not None:
            keys["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return keys | ({"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if dense else {})
