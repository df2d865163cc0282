"""Qwen3-MoE with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: softmax over the K best logits. Keys of config.json: see `zero_expert_routing`. `model_type` stays `qwen3_moe`,
so that transformers merges the per-expert weights on loading as for the stock model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

from .zero_expert_model import ZeroExpertModel
from .zero_expert_routing import SoftmaxPicks


class ZeroExpertRouter(SoftmaxPicks, Qwen3MoeTopKRouter):
    """Qwen3-MoE's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_experts)


class Qwen3MoePlusPlusForCausalLM(ZeroExpertModel, Qwen3MoeForCausalLM, GenerationMixin):
    """Stock Qwen3-MoE whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = Qwen3MoeSparseMoeBlock, ZeroExpertRouter, "num_experts"
