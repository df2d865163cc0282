"""DeepSeek-V2 (V2-Lite) with zero experts for transformers >= 5.16; travels with checkpoints, with the two files it
imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: softmax over all experts, the K best of all or out of the groups with the best experts, times
routed_scaling_factor; zero experts belong to no group; the shared experts are added as usual. Keys of config.json: see
`zero_expert_routing`. `model_type` stays `deepseek_v2`, so that transformers merges the per-expert weights as for the
stock model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

import torch
from torch.nn import functional as F
from transformers.generation import GenerationMixin
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2Moe,
    DeepseekV2TopkRouter,
)

from .zero_expert_model import ZeroExpertModel
from .zero_expert_routing import ZeroExpertRouting, limit_to_groups


class ZeroExpertRouter(ZeroExpertRouting, DeepseekV2TopkRouter):
    """DeepSeek-V2's router over real and zero experts, float32."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.n_routed_experts)
        limited = config.topk_method == "group_limited_greedy"
        self.groups = (config.n_group or 1, config.topk_group or 1) if limited else (1, 1)

    def _project(self, hidden_TH, weight_EH):
        return F.linear(hidden_TH.float(), weight_EH.float())

    def _pick(self, logits_TE):
        scores = logits_TE.softmax(dim=-1, dtype=torch.float32)
        choice = limit_to_groups(scores, self.num_real, *self.groups, best=1)
        ids = torch.topk(choice, self.top_k, dim=-1, sorted=False)[1]
        return scores.gather(1, ids) * self.routed_scaling_factor, ids


class DeepseekV2PlusPlusForCausalLM(ZeroExpertModel, DeepseekV2ForCausalLM, GenerationMixin):
    """Stock DeepSeek-V2 whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = DeepseekV2Moe, ZeroExpertRouter, "n_routed_experts"
