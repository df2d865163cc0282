"""gpt-oss with zero experts for transformers >= 5.0; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: the K best logits, softmax over them; zero experts have router biases too. Keys of config.json: see
`zero_expert_routing`. `model_type` stays `gpt_oss`, so that transformers treats the fused expert weights as those of
the stock model.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.generation import GenerationMixin
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM, GptOssMLP, GptOssTopKRouter

from .zero_expert_model import ZeroExpertModel, ZeroExpertMoeBlock
from .zero_expert_routing import ZeroExpertRouting


class ZeroExpertRouter(ZeroExpertRouting, GptOssTopKRouter):
    """gpt-oss' router over real and zero experts."""

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_local_experts)
        self.bias = nn.Parameter(torch.zeros(self.num_real + self.zero.rows, dtype=self.bias.dtype))

    def _project(self, hidden_TH, weight_EH):
        return F.linear(hidden_TH, weight_EH, self.bias[: len(weight_EH)])

    def _pick(self, logits_TE):
        best, ids = torch.topk(logits_TE, self.top_k, dim=-1)
        return F.softmax(best, dim=-1, dtype=best.dtype).float(), ids


class GptOssBlock(ZeroExpertMoeBlock):
    """A MoE block whose router has another name, and which gives two things."""

    ROUTER_NAME = "router"

    def forward(self, hidden_BSH):
        """[B, S, H] -> ([B, S, H], None): the stock block gives its weights too, which its layer drops."""
        return super().forward(hidden_BSH), None

    def _may_leave_out(self):
        """The stock loop over experts, unlike that of other models, knows no id N."""
        told = getattr(getattr(self.experts, "config", None), "_experts_implementation", "eager")
        return told != "eager" and super()._may_leave_out()


class GptOssPlusPlusForCausalLM(ZeroExpertModel, GptOssForCausalLM, GenerationMixin):
    """Stock gpt-oss whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = GptOssMLP, ZeroExpertRouter, "num_local_experts"
    BLOCK = GptOssBlock
