"""Qwen3.5 and 3.6 with zero experts for transformers >= 5.2; travels with checkpoints, with the two files it imports.

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

Routing: softmax over all experts, the K best; the shared expert is added behind its gate. The tower of vision, gated
delta networks and the cache of their states are the stock model's. Keys of config.json: see `zero_expert_routing`; they
stand in `text_config`. `model_type` stays the native one, so that transformers renames and merges weights as for the
stock model. A folder of the language model alone opens with AutoModelForCausalLM.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeSparseMoeBlock,
    Qwen3_5MoeTopKRouter,
)

from .zero_expert_model import GatedSharedBlock, ZeroExpertModel
from .zero_expert_routing import SoftmaxPicks


class ZeroExpertRouter(SoftmaxPicks, Qwen3_5MoeTopKRouter):
    """Qwen3.5's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_experts)


class _ZeroExperts(ZeroExpertModel):
    MOE_BLOCK, ROUTER, NUM_EXPERTS = Qwen3_5MoeSparseMoeBlock, ZeroExpertRouter, "num_experts"
    BLOCK, ROUTER_DRAWN_BY_BLOCK = GatedSharedBlock, True


class Qwen3_5MoePlusPlusForCausalLM(_ZeroExperts, Qwen3_5MoeForCausalLM, GenerationMixin):
    """The language model alone; `ValueError` for a config that makes no sense."""


class Qwen3_5MoePlusPlusForConditionalGeneration(
    _ZeroExperts, Qwen3_5MoeForConditionalGeneration, GenerationMixin
):
    """Stock Qwen3.5 whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    _auto_class = "AutoModelForImageTextToText"
