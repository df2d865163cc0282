"""What vLLM's own models get to have zero experts in their MoE layers, shared or paired; the rest of each is vLLM's."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from .install import Names, install_zero_experts, prefer_skipping_kernels
from .meter import ZeroShareMeter
from .request_dials import RequestDials


class DynamicModel:
    """Goes before a stock `...ForCausalLM` among the bases of a class, which names its MoE block."""

    MOE_BLOCK: type
    """The stock MoE block that is replaced."""
    NAMES = Names()
    """What its layers call things."""
    zero_share_meter: ZeroShareMeter
    """Counts of every MoE layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        prefer_skipping_kernels(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text = vllm_config.model_config.hf_text_config
        decoder = getattr(self, "language_model", self).model  # a model that sees has one inside
        self.zero_share_meter = install_zero_experts(
            decoder.layers, self.MOE_BLOCK, text, vllm_config, self.sparse_layers(text), self.NAMES
        )

    @staticmethod
    def sparse_layers(config) -> list[int]:
        """Numbers of the layers with experts: all."""
        return list(range(config.num_hidden_layers))

    def forward(self, input_ids, positions, *args, **kwargs):
        self.zero_share_meter.tick()
        RequestDials.see_batch(input_ids, positions)
        return super().forward(input_ids, positions, *args, **kwargs)


def every_few_sparse(config) -> list[int]:
    """Numbers of the layers with experts, for configs that say `decoder_sparse_step` and `mlp_only_layers`."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
    return [n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0]


class FirstLayersDense(DynamicModel):
    """Models whose first layers have no experts."""

    @staticmethod
    def sparse_layers(config) -> list[int]:
        return list(range(config.first_k_dense_replace, config.num_hidden_layers))


LATENT_EPS = 1e-6
"""Epsilon of the norms of latents in transformers (and of training here); vLLM gives them the config's."""


class LatentAttentionModel(FirstLayersDense):
    """The same with latent attention, to which it gives transformers' numbers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _correct_latent_attention(self.model.layers)


def _correct_latent_attention(layers) -> None:
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            norm = getattr(attention, name, None)
            if norm is not None:
                norm.variance_epsilon = LATENT_EPS
        if attention is not None and current_platform.is_cpu():
            # vLLM 0.32: the CPU kernel turns interleaved queries wrongly, the PyTorch form does not (docs/serving.md).
            attention.rotary_emb._forward_method = attention.rotary_emb.forward_native
