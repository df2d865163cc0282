"""Mixtral with zero experts for vLLM; the rest of the model is vLLM's own."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.mixtral import MixtralForCausalLM, MixtralMoE

from .install import install_zero_experts


class MixtralPlusPlusForCausalLM(MixtralForCausalLM):
    """Stock Mixtral whose MoE layers skip zero experts, shared or paired.

    Attributes:
        zero_share_meter: counts of every MoE layer.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.zero_share_meter = install_zero_experts(
            self.model.layers, MixtralMoE, self.config, vllm_config, name="block_sparse_moe"
        )

    def compute_logits(self, hidden_states):
        self.zero_share_meter.tick()
        return super().compute_logits(hidden_states)
