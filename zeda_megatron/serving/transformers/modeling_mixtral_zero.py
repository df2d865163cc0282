"""Mixtral with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: softmax over the K best logits. Keys of config.json: see `zero_expert_routing`. `model_type` stays `mixtral`,
so that transformers merges the per-expert weights on loading as for the stock model. The stock block's noise on inputs
while training (`router_jitter_noise`, 0 in published models) is left out.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.mixtral.modeling_mixtral import (
    MixtralForCausalLM,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)

from .zero_expert_model import ZeroExpertModel
from .zero_expert_routing import SoftmaxPicks


class ZeroExpertRouter(SoftmaxPicks, MixtralTopKRouter):
    """Mixtral's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_local_experts)


class MixtralPlusPlusForCausalLM(ZeroExpertModel, MixtralForCausalLM, GenerationMixin):
    """Stock Mixtral whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = MixtralSparseMoeBlock, ZeroExpertRouter, "num_local_experts"
