"""vLLM's own models with zero experts in their MoE layers, shared or paired; the rest of each is vLLM's."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.glm4_moe_lite import Glm4MoeLite, Glm4MoeLiteForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM, MixtralMoE
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeSparseMoeBlock
from vllm.platforms import current_platform

from .install import install_zero_experts, prefer_skipping_kernels
from .meter import ZeroShareMeter
from .request_dials import RequestDials

LATENT_EPS = 1e-6
"""Epsilon of the norms of GLM's latents in transformers (and of training here); vLLM gives them the config's."""


class _Dynamic:
    """What every model here has beside its layers."""

    zero_share_meter: ZeroShareMeter
    """Counts of every MoE layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        prefer_skipping_kernels(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def forward(self, input_ids, positions, *args, **kwargs):
        self.zero_share_meter.tick()
        RequestDials.see_batch(input_ids, positions)
        return super().forward(input_ids, positions, *args, **kwargs)


class Qwen3MoePlusPlusForCausalLM(_Dynamic, Qwen3MoeForCausalLM):
    """Qwen3-MoE."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config
        step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
        numbers = [n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0]
        self.zero_share_meter = install_zero_experts(
            self.model.layers, Qwen3MoeSparseMoeBlock, config, vllm_config, numbers
        )


class MixtralPlusPlusForCausalLM(_Dynamic, MixtralForCausalLM):
    """Mixtral."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        numbers = list(range(self.config.num_hidden_layers))
        self.zero_share_meter = install_zero_experts(
            self.model.layers, MixtralMoE, self.config, vllm_config, numbers, name="block_sparse_moe"
        )


class Glm4MoeLitePlusPlusForCausalLM(_Dynamic, Glm4MoeLiteForCausalLM):
    """GLM-4.7-Flash, with transformers' numbers in its attention."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        _name_dense_layers(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _correct_attention(self.model.layers)
        numbers = list(range(self.config.first_k_dense_replace, self.config.num_hidden_layers))
        self.zero_share_meter = install_zero_experts(
            self.model.layers, Glm4MoeLite, self.config, vllm_config, numbers
        )


def _correct_attention(layers) -> None:
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            norm = getattr(attention, name, None)
            if norm is not None:
                norm.variance_epsilon = LATENT_EPS
        if attention is not None and current_platform.is_cpu():
            # vLLM 0.32: the CPU kernel turns interleaved queries wrongly, the PyTorch form does not (docs/serving.md).
            attention.rotary_emb._forward_method = attention.rotary_emb.forward_native


def _name_dense_layers(config) -> None:
    """vLLM reads `first_k_dense_replace`, as published; transformers saves `mlp_layer_types` in its place."""
    if getattr(config, "first_k_dense_replace", None) is not None:
        return
    kinds = list(getattr(config, "mlp_layer_types", None) or [])
    dense = kinds.count("dense")
    if not kinds or kinds[:dense] != ["dense"] * dense:
        raise ValueError(
            f"config.json: mlp_layer_types {kinds}: dense layers must come first (or give first_k_dense_replace)"
        )
    config.first_k_dense_replace = dense
