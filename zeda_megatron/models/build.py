"""Build a Megatron GPTModel for an architecture, static or with zero experts.

Layers are Transformer Engine's where it is installed, ours otherwise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from ..config.parallel import STAGES, ParallelConfig, stage_sizes
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..moe.dispatch import install_dispatchers
from ..moe.experts import draw_experts_apart, mark_expert_parameters
from ..moe.paired import install_residual_norms
from ..moe.spec import apply_grouped_experts, apply_zero_experts, train_score_bias
from ..runtime.megatron_api import mend_latent_attention, moe_submodules
from .architecture import Architecture
from .latent_attention import LatentAttention, install_rotary
from .local_layers import (
    KeyHeadsNorm,
    QueryHeadsNorm,
    SDPAttention,
    SPRMSNorm,
    with_explicit_masks,
)
from .mtp_head import build_mtp_head, first_positions
from .rotary import factor_fields


class ZedaGPTModel(GPTModel):
    """GPTModel that can stop before the LM head, so that the loss is computed in chunks of the vocabulary.

    Attributes:
        mtp: its head of multi-token prediction, where the architecture asks for one (Megatron looks for the attribute).
            Only `draft` runs it; Megatron's own loss on such heads, which makes all logits, stays unused.
    """

    _to_head = True
    mtp: MultiTokenPredictionBlock

    def forward(self, *args, return_hidden: bool = False, **kwargs):
        """Megatron's. With `return_hidden` the last pipeline stage returns hidden states [S, B, H] (after the final
        norm; the local part under sequence parallelism) instead of logits."""
        self._to_head = not return_hidden
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._to_head = True

    def _postprocess(self, hidden_states, *args, **kwargs):
        if self.post_process and not self._to_head:
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)

    def draft(
        self,
        hidden_SBH: torch.Tensor,
        next_tokens: torch.Tensor,
        position_ids: torch.Tensor,
        packed_seq_params=None,
        padding_mask: torch.Tensor | None = None,
        head: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """States of the head of multi-token prediction: through the LM head they say what comes after `next_tokens`.

        Gradients reach the head alone, see `mtp_head`.

        Args:
            hidden_SBH: what `forward` gave with `return_hidden`; the local part under sequence parallelism.
            next_tokens: [B, S] int64: the token behind each position, anything where its sequence has none.
            position_ids: [B, S], counted from 0 in each sequence. padding_mask: [B, S], True = padding.
            head: another model's `MTPHead`, in the place of this one's.

        Returns:
            [S, B, H], at each position t of a sequence for its token t+2.
        """
        with torch.no_grad():
            embedded_SBH, rotary, cos, sin, offset, padding_mask = self._preprocess(
                next_tokens, position_ids, packed_seq_params=packed_seq_params, padding_mask=padding_mask
            )[:6]
            first_SB1 = first_positions(position_ids, self.pg_collection.tp, self.config.sequence_parallel)
            embedded_SBH = embedded_SBH.masked_fill(first_SB1, 0.0)
        head = self.mtp.layers[0] if head is None else head
        return head(
            hidden_SBH.detach(),
            embedded_SBH,
            padding_mask,
            rotary_pos_emb=rotary,
            rotary_pos_cos=cos,
            rotary_pos_sin=sin,
            sequence_len_offset=offset,
            packed_seq_params=packed_seq_params,
        )

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the LM head, [V/tp, H]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(
    arch: Architecture,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    overrides: dict[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron's config of an architecture on a parallel layout.

    Fusions that need CUDA extensions are off; `overrides` (Megatron's field names) win over everything.
    Raises `UserError` for a layout that does not divide the model.
    """
    parallel = parallel or ParallelConfig()
    check_layout(arch, parallel)
    te = has_transformer_engine()
    fields = {
        **{name: value for name, value in arch.megatron.items() if name not in OWN_FIELDS},
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_stages,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        # Between two ranks the interleaved schedule has two messages under way: batched, they get mixed up silently.
        "overlap_p2p_comm": parallel.virtual_stages is not None,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        # Megatron demands sequence parallelism for MoE training under tensor parallelism.
        "sequence_parallel": parallel.tensor_model_parallel_size > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        "moe_permute_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "batch_p2p_comm": False,
        **(overrides or {}),
    }
    if fields.get("multi_latent_attention"):
        kind = "rope" if arch.rotary.factor == 1.0 else "yarn"
        config = MLATransformerConfig(**{"rotary_base": arch.rotary.base, "rope_type": kind, **fields})
    else:
        config = TransformerConfig(**fields)
    own = {name: arch.megatron[name] for name in OWN_FIELDS if name in arch.megatron}
    for name, value in (own | factor_fields(arch.rotary)).items():
        setattr(config, name, value)
    return config


OWN_FIELDS = ("partial_rotary", "qk_norm_over_heads", "moe_router_group_scores")
"""What a model file may say beside Megatron's fields, attributes of the config: that not all channels of a head are
turned, that norms of queries and keys are over all heads together, and how many of a group's best scores make its score
(`moe.group_limit`)."""


def check_layout(arch: Architecture, parallel: ParallelConfig) -> None:
    """Raise `UserError` if a parallel size does not divide what it splits, or no layers are left for a stage."""
    tp = parallel.tensor_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    fields = arch.megatron
    for flag, size, what, whole in (
        ("--tensor-model-parallel-size", tp, "attention heads", fields["num_attention_heads"]),
        ("--tensor-model-parallel-size", tp, "key/value heads", fields.get("num_query_groups")),
        ("--tensor-model-parallel-size", tp, "channels of the dense MLP", fields["ffn_hidden_size"]),
        (
            "--tensor-model-parallel-size",
            tp,
            "channels of the shared expert",
            fields.get("moe_shared_expert_intermediate_size"),
        ),
        (
            "--tensor-model-parallel-size",
            tp,
            "key heads of linear attention",
            fields.get("linear_attention_freq") and fields["linear_num_key_heads"],
        ),
        ("--expert-model-parallel-size", ep, "experts", fields["num_moe_experts"]),
        ("--expert-tensor-parallel-size", etp, "channels of an expert", fields["moe_ffn_hidden_size"]),
    ):
        if whole and whole % size:
            raise UserError(f"{flag} {size} does not divide the model's {whole} {what}")
    if etp > 1 and fields["add_bias_linear"]:
        raise UserError(
            f"--expert-tensor-parallel-size {etp}: this model's experts have biases, which Megatron would add on every "
            "rank; use --expert-model-parallel-size"
        )
    cp = parallel.context_parallel_size
    if cp > 1 and fields.get("softmax_type") == "learnable" and has_transformer_engine():
        raise UserError(
            f"--context-parallel-size {cp}: this model's attention has sinks, for which Transformer Engine has no "
            "kernel that splits a sequence; use --tensor-model-parallel-size"
        )
    if cp > 1 and fields.get("linear_attention_freq"):
        raise UserError(
            f"--context-parallel-size {cp}: this model has linear attention, whose state goes from token to token "
            "through a whole sequence; use --tensor-model-parallel-size"
        )
    stage_sizes(fields["num_layers"], parallel)


def build_gpt_model(
    arch: Architecture,
    config: TransformerConfig,
    zero: ZeroExpertConfig | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    expert_backend: str = "auto",
    use_te: bool | None = None,
) -> ZedaGPTModel:
    """Build this rank's part of the model, on the current device, with Megatron's initial weights.

    Args:
        arch: geometry. config: from `transformer_config`.
        zero: zero experts; None builds the static model with Megatron's own router.
        expert_backend: product of the local experts, see `moe.experts`.
    """
    if arch.mtp_layers and config.pipeline_model_parallel_size > 1:
        raise UserError(
            f"{STAGES} {config.pipeline_model_parallel_size} does not work with a head of multi-token prediction: it "
            "needs the embedding of the first stage"
        )
    if expert_backend != "auto":
        config.moe_grouped_gemm = False  # one that is named takes the place of Transformer Engine's
    block = decoder_block_spec(config, vp_stage=vp_stage, use_te=use_te)
    if zero is None and config.moe_router_group_topk:
        zero = ZeroExpertConfig()  # Megatron's own group limit sums another number of scores
    if zero is None:
        block = apply_grouped_experts(block, expert_backend)
        if config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate:
            block = train_score_bias(block)
    else:
        zero.validate(config.num_moe_experts, config.moe_router_topk)
        block = apply_zero_experts(block, zero, expert_backend)
    divisor = config.tensor_model_parallel_size
    with norms_admitted(config):
        model = ZedaGPTModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=math.ceil(arch.vocab_size / divisor) * divisor,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_percent=1.0,
            rotary_base=arch.rotary.base,
            vp_stage=vp_stage,
        )
    if arch.mtp_layers:
        model.mtp = build_mtp_head(config, block, has_transformer_engine() if use_te is None else use_te)
    install_rotary(model, arch.rotary, with_factor=getattr(config, "rope_type", None) == "yarn")
    install_dispatchers(model)
    install_residual_norms(model)
    mark_expert_parameters(model)
    draw_experts_apart(model, config)
    # The converter builds on the meta device to learn keys and shapes.
    if torch.cuda.is_available() and not next(model.parameters()).is_meta:
        model.cuda(torch.cuda.current_device())
    return model


@contextmanager
def norms_admitted(config: TransformerConfig) -> Iterator[None]:
    """Say `qk_layernorm` while a model with norms over all heads is built, as newer versions ask, and not afterwards:
    under it Megatron sums the gradients of such norms over tensor-parallel ranks, where here every rank has its own."""
    said = config.qk_layernorm
    config.qk_layernorm = said or getattr(config, "qk_norm_over_heads", False)
    try:
        yield
    finally:
        config.qk_layernorm = said


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
        mend_latent_attention()
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention
            attention.module = LatentAttention
            attention.params = {**attention.params, "whole_down_projections": not use_te}
    over_heads = getattr(config, "qk_norm_over_heads", False)
    linear = _use_linear_attention(config, block, vp_stage, use_te)
    if use_te:
        for layer, is_linear in zip(block.layer_specs, linear, strict=True):
            if is_linear:
                continue
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = with_explicit_masks(attention.core_attention)
            if over_heads:
                attention.q_layernorm, attention.k_layernorm = QueryHeadsNorm, KeyHeadsNorm
        return block
    for layer, is_linear in zip(block.layer_specs, linear, strict=True):
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = SPRMSNorm
        dense = moe_submodules(layer) is None
        parts.sharded_state_dict_keys_map = _fused_keys(config, dense, is_linear)
        if is_linear:
            continue
        attention = parts.self_attention.submodules
        attention.core_attention = SDPAttention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) is not IdentityOp:
                setattr(attention, name, SPRMSNorm)
        if over_heads:
            attention.q_layernorm, attention.k_layernorm = QueryHeadsNorm, KeyHeadsNorm
    block.layer_norm = SPRMSNorm
    return block


def _use_linear_attention(
    config, block: TransformerBlockSubmodules, vp_stage: int | None, use_te: bool
) -> list[bool]:
    """Give the layers that `linear_attention_freq` names their gated delta networks; says which layers they are."""
    if not config.linear_attention_freq:
        return [False] * len(block.layer_specs)
    # It brings transformers' model with it: seconds that other models need not wait.
    from .gated_delta import GatedDeltaNet

    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    linear = [bool(it) for it in config.linear_attention_freq[first : first + len(block.layer_specs)]]
    # Layers of one kind share a spec.
    block.layer_specs = [
        copy.deepcopy(layer) if it else layer for layer, it in zip(block.layer_specs, linear, strict=True)
    ]
    for layer, it in zip(block.layer_specs, linear, strict=True):
        if it:
            layer.submodules.self_attention = ModuleSpec(GatedDeltaNet)
            if use_te:  # there the norm lies inside attention
                layer.submodules.input_layernorm = block.layer_norm
    return linear


def _fused_keys(config, dense: bool, linear: bool) -> dict[str, str]:
    """Checkpoint keys as Transformer Engine's spec writes them.

    It fuses the input norm into linear_qkv (latent attention: the latents' norms into the up projections, the input
    norm stays; linear attention: it stays), and the norm before a dense MLP into linear_fc1, but not the norm before a
    MoE layer.
    """
    if linear:
        keys = {}
    elif config.multi_latent_attention:
        keys = {"self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_"}
        if config.q_lora_rank is not None:
            keys["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return keys | ({"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if dense else {})
