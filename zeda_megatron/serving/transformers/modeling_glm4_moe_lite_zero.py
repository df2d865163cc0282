"""GLM-4.7-Flash with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: sigmoid scores, the K best by score + bias, weights = score / sum of the K, times routed_scaling_factor; the
shared expert is added as usual. Keys of config.json: see `zero_expert_routing`. `model_type` stays `glm4_moe_lite`, so
that transformers merges the per-expert weights as for the stock model. Multi-token-prediction layers are ignored.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

from transformers.generation import GenerationMixin
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import (
    Glm4MoeLiteForCausalLM,
    Glm4MoeLiteMoE,
    Glm4MoeLiteTopkRouter,
)

from .zero_expert_model import CarriesHeads, ZeroExpertModel
from .zero_expert_routing import SigmoidPicks


class ZeroExpertRouter(SigmoidPicks, Glm4MoeLiteTopkRouter):
    """GLM's router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.n_routed_experts)


class Glm4MoeLitePlusPlusForCausalLM(CarriesHeads, ZeroExpertModel, Glm4MoeLiteForCausalLM, GenerationMixin):
    """Stock GLM-4.7-Flash whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = Glm4MoeLiteMoE, ZeroExpertRouter, "n_routed_experts"
