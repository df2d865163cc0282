"""Qwen3-Next with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: softmax over all experts, the K best; the shared expert is added behind its gate. Gated delta networks and the
cache of their states are the stock model's. Keys of config.json: see `zero_expert_routing`. `model_type` stays
`qwen3_next`, so that transformers merges the per-expert weights on loading as for the stock model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextForCausalLM,
    Qwen3NextSparseMoeBlock,
    Qwen3NextTopKRouter,
)

from .zero_expert_model import GatedSharedBlock, ZeroExpertModel
from .zero_expert_routing import SoftmaxPicks


class ZeroExpertRouter(SoftmaxPicks, Qwen3NextTopKRouter):
    """Qwen3-Next's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_experts)


class Qwen3NextPlusPlusForCausalLM(ZeroExpertModel, Qwen3NextForCausalLM, GenerationMixin):
    """Stock Qwen3-Next whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = Qwen3NextSparseMoeBlock, ZeroExpertRouter, "num_experts"
    BLOCK, ROUTER_DRAWN_BY_BLOCK = GatedSharedBlock, True
