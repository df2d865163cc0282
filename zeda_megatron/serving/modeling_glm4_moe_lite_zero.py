"""GLM-4.7-Flash with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: sigmoid scores, the K best by score + bias, weights = score / sum of the K, times routed_scaling_factor; the
shared expert is added as usual. Keys of config.json: see `zero_expert_routing`. `model_type` stays `glm4_moe_lite`, so
that transformers merges the per-expert weights as for the stock model. Multi-token-prediction layers are ignored.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.generation import GenerationMixin
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import (
    Glm4MoeLiteForCausalLM,
    Glm4MoeLiteMoE,
    Glm4MoeLiteTopkRouter,
)

from .zero_expert_model import ZeroExpertModel
from .zero_expert_routing import ZeroExpertRouting


class ZeroExpertRouter(ZeroExpertRouting, Glm4MoeLiteTopkRouter):
    """GLM's router over real and zero experts, float32; zero experts have score biases too."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.n_routed_experts)
        rows = self.num_real + self.zero.rows
        self.e_score_correction_bias = nn.Buffer(torch.zeros(rows, dtype=torch.float32))

    def _project(self, hidden_TH, weight_EH):
        return F.linear(hidden_TH.float(), weight_EH.float())

    def _pick(self, logits_TE):
        scores = logits_TE.sigmoid()
        bias_E = self.e_score_correction_bias[: scores.shape[1]]
        ids = torch.topk(scores + bias_E, self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.routed_scaling_factor, ids


class Glm4MoeLitePlusPlusForCausalLM(ZeroExpertModel, Glm4MoeLiteForCausalLM, GenerationMixin):
    """Stock GLM-4.7-Flash whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = Glm4MoeLiteMoE, ZeroExpertRouter, "n_routed_experts"

    def __init__(self, config):
        super().__init__(config)
        layers, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
        ignored = {rf"model\.layers\.{layers + i}\..*" for i in range(more)}
        self._keys_to_ignore_on_load_unexpected = ignored | set(self._keys_to_ignore_on_load_unexpected or ())
