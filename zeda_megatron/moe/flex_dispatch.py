"""Metadata of the flex dispatcher for tokens with fewer than K real experts.

DeepEP takes K expert numbers per token, -1 for none. Megatron's manager fills a token's free places with whatever
experts its top-k over the weights comes upon, at weight 0: sent, counted and multiplied for nothing. HybridEP takes
the routing map itself and needs nothing.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import _DeepepManager


class RealSlotsDeepepManager(_DeepepManager):
    """Megatron's manager of DeepEP, told which of a token's K places are taken."""

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        tokens = routing_map.shape[0]
        map_TE, probs_TE = (x.reshape(tokens, self.num_experts) for x in (routing_map, probs))
        # By the map, not by the weight: a head of paired zero experts that trains dispatches picks of weight 0.
        order_TE = probs_TE.detach().masked_fill(~map_TE, -1.0)
        index_TK = order_TE.topk(self.router_topk, dim=-1).indices
        free_TK = ~map_TE.gather(1, index_TK)
        self.token_probs = probs_TE.gather(1, index_TK).masked_fill(free_TK, 0.0)
        self.token_indices = index_TK.masked_fill(free_TK, -1)
