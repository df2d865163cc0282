"""Token dispatchers that are told the true number of rows: zero slots are never sent."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)

from ..errors import UserError


class _ZeroSlots:
    """Shared by both dispatchers: adds what `copy` or `learned` zero experts contribute."""

    zero_output = None
    _layer_input = None

    def dispatch_preprocess(self, hidden_states, routing_map, probs):
        if self.zero_output is not None:
            self._layer_input = hidden_states
        return super().dispatch_preprocess(hidden_states, routing_map, probs)

    def combine_postprocess(self, hidden_states):
        output = super().combine_postprocess(hidden_states)
        if self.zero_output is not None:
            layer_input, self._layer_input = self._layer_input, None
            extra = self.zero_output(layer_input.reshape(-1, layer_input.shape[-1]))
            if extra is not None:
                output = output + extra.view_as(output)
        return output


class ZeroExpertAllGatherDispatcher(_ZeroSlots, MoEAllGatherTokenDispatcher):
    """Megatron's all-gather dispatcher; it counts the routing map already."""


class ZeroExpertAlltoAllDispatcher(_ZeroSlots, MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher with a data-dependent number of rows.

    Upstream assumes tokens x top-k rows. With zero experts fewer slots exist: the fused permute then fills a
    buffer that is too long, and newer cores slice wrong in the unfused one as well.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        if routing_map.is_cuda:
            # The count is needed on the host before the first permutation.
            self._maybe_update_cuda_sync_point("before_permutation_1")
        else:
            self.num_out_tokens = int(self.num_out_tokens)
        return tokens_per_expert


_DISPATCHERS = {
    MoEAllGatherTokenDispatcher: ZeroExpertAllGatherDispatcher,
    MoEAlltoAllTokenDispatcher: ZeroExpertAlltoAllDispatcher,
}


def install_dispatchers(model: torch.nn.Module) -> None:
    """Replace the dispatcher of every MoE layer whose router has zero experts. Call after building the model.

    Raises `UserError` for a dispatcher type that cannot take a variable number of rows.
    """
    for layer in model.modules():
        if not isinstance(layer, MoELayer) or not hasattr(layer.router, "routing_stats"):
            continue
        stock = layer.token_dispatcher
        kind = _DISPATCHERS.get(type(stock))
        if kind is None:
            raise UserError(
                f"--moe-token-dispatcher-type {layer.config.moe_token_dispatcher_type} is not supported with zero "
                "experts; use alltoall or allgather"
            )
        groups = ProcessGroupCollection()
        groups.ep, groups.expt_tp, groups.tp_ep = stock.ep_group, stock.tp_group, stock.tp_ep_group
        dispatcher = kind(
            layer.num_local_experts, layer.local_expert_indices, config=layer.config, pg_collection=groups
        )
        dispatcher.zero_output = layer.router.zero_output
        if stock.shared_experts is not None:
            dispatcher.set_shared_experts(stock.shared_experts)
        layer.token_dispatcher = dispatcher
