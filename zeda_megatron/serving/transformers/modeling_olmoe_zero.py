"""OLMoE with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: softmax over all experts, the K best. Keys of config.json: see `zero_expert_routing`. `model_type` stays
`olmoe`, so that transformers merges the per-expert weights on loading as for the stock model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeSparseMoeBlock, OlmoeTopKRouter

from .zero_expert_model import ZeroExpertModel
from .zero_expert_routing import SoftmaxPicks


class ZeroExpertRouter(SoftmaxPicks, OlmoeTopKRouter):
    """OLMoE's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_experts)


class OlmoePlusPlusForCausalLM(ZeroExpertModel, OlmoeForCausalLM, GenerationMixin):
    """Stock OLMoE whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = OlmoeSparseMoeBlock, ZeroExpertRouter, "num_experts"
