"""Qwen2-MoE with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: softmax over all experts, the K best; the shared expert is added behind its gate. Keys of config.json: see
`zero_expert_routing`. `model_type` stays `qwen2_moe`, so that transformers merges the per-expert weights on loading as
for the stock model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeForCausalLM,
    Qwen2MoeSparseMoeBlock,
    Qwen2MoeTopKRouter,
)

from .zero_expert_model import GatedSharedBlock, ZeroExpertModel
from .zero_expert_routing import SoftmaxPicks


class ZeroExpertRouter(SoftmaxPicks, Qwen2MoeTopKRouter):
    """Qwen2-MoE's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_experts)


class Qwen2MoePlusPlusForCausalLM(ZeroExpertModel, Qwen2MoeForCausalLM, GenerationMixin):
    """Stock Qwen2-MoE whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = Qwen2MoeSparseMoeBlock, ZeroExpertRouter, "num_experts"
    BLOCK = GatedSharedBlock
