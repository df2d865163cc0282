"""DeepSeek-V3 (R1, V3.1, Kimi-K2, Moonlight) with zero experts for transformers >= 5.0; travels with checkpoints, with
the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: sigmoid scores, the K best by score + bias out of the best groups of experts, weights = score / sum of the K,
times routed_scaling_factor; zero experts belong to no group; the shared expert is added as usual. Keys of config.json:
see `zero_expert_routing`. `model_type` stays `deepseek_v3`, so that transformers merges the per-expert weights as for
the stock model. Multi-token-prediction layers are ignored.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3MoE,
    DeepseekV3TopkRouter,
)

from .zero_expert_model import CarriesHeads, ZeroExpertModel
from .zero_expert_routing import SigmoidPicks


class ZeroExpertRouter(SigmoidPicks, DeepseekV3TopkRouter):
    """DeepSeek-V3's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.n_routed_experts)


class DeepseekV3PlusPlusForCausalLM(CarriesHeads, ZeroExpertModel, DeepseekV3ForCausalLM, GenerationMixin):
    """Stock DeepSeek-V3 whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = DeepseekV3MoE, ZeroExpertRouter, "n_routed_experts"
