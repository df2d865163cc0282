"""MiniMax-M2 with zero experts for transformers >= 5.19; travels with checkpoints, with the two files it imports.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Routing: sigmoid scores, the K best by score + bias, weights = score / sum of the K. Keys of config.json: see
`zero_expert_routing`. `model_type` stays `minimax_m2`, so that transformers merges the per-expert weights on loading as
for the stock model. The stock block's noise on inputs while training (`router_jitter_noise`, 0 in published models) is
left out.

transformers looks for the text `@use_experts_implementation` in this file before it lets a user choose
`experts_implementation`: here "eager" means a loop over experts, everything else one grouped product.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.generation import GenerationMixin
from transformers.models.minimax_m2.modeling_minimax_m2 import (
    MiniMaxM2ForCausalLM,
    MiniMaxM2SparseMoeBlock,
    MiniMaxM2TopKRouter,
)

from .zero_expert_model import ZeroExpertModel, ZeroExpertMoeBlock
from .zero_expert_routing import ZeroExpertRouting


class ZeroExpertRouter(ZeroExpertRouting, MiniMaxM2TopKRouter):
    """MiniMax-M2's router over real and zero experts."""

    ROUNDED = False

    def __init__(self, config):
        super().__init__(config)
        self.add_zero_experts(config, config.num_local_experts)

    def _project(self, hidden_TH, weight_EH):
        return F.linear(hidden_TH.to(weight_EH.dtype), weight_EH)

    def _pick(self, logits_TE, bias_E):
        scores = logits_TE.float().sigmoid()
        ids = torch.topk(scores + bias_E[: scores.shape[1]], self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / weights.sum(dim=-1, keepdim=True), ids


class BiasedBlock(ZeroExpertMoeBlock):
    """A MoE block that keeps the score biases, as MiniMax' does; zero experts have some too."""

    def __init__(self, stock, router):
        super().__init__(stock, router)
        rows = router.num_real + router.zero.rows
        self.e_score_correction_bias = nn.Buffer(torch.zeros(rows, dtype=stock.e_score_correction_bias.dtype))

    def route(self, hidden_TH):
        return self.gate(hidden_TH, self.e_score_correction_bias)


class MiniMaxM2PlusPlusForCausalLM(ZeroExpertModel, MiniMaxM2ForCausalLM, GenerationMixin):
    """Stock MiniMax-M2 whose MoE blocks skip zero experts; `ValueError` for a config that makes no sense."""

    MOE_BLOCK, ROUTER, NUM_EXPERTS = MiniMaxM2SparseMoeBlock, ZeroExpertRouter, "num_local_experts"
    BLOCK = BiasedBlock

    def __init__(self, config):
        told = getattr(config, "rotary_dim", None)
        turned = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        if told not in (None, turned):
            raise ValueError(
                f"config.json: rotary_dim {told}: this transformers turns {turned} channels; use 5.19 or newer"
            )
        super().__init__(config)
