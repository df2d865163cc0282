"""Training a score bias: Megatron's router, counting the tokens that no padding is."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..runtime.megatron_api import moe_submodules


class BiasTrainingRouter(TopKRouter):
    """`TopKRouter` whose score bias moves with `moe_router_bias_update_rate` (arXiv 2408.15664) on padded rows too.

    Megatron 0.16.1 joins the map [T, N] with a padding mask [T] as if both had the same shape.
    """

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Count each expert's tokens of a micro-batch. routing_map [T, N]; padding_mask [T], True = padding."""
        if not (self.enable_expert_bias and torch.is_grad_enabled()):
            return
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        self.local_tokens_per_expert += routing_map.sum(dim=0)


def train_score_bias(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Return a copy of a block spec whose MoE layers have that router."""
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs:
        moe = moe_submodules(layer)
        if moe is not None:
            moe.router = BiasTrainingRouter
    return spec
