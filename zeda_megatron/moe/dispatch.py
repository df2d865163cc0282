"""Token dispatchers that are told the true number of rows: zero slots are never sent."""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    _DeepepManager,
)

from ..errors import UserError


class RealSlotsDeepepManager(_DeepepManager):
    """Megatron's manager of DeepEP, told which of a token's K places are taken.

    DeepEP takes K expert numbers per token, -1 for none. Megatron's manager fills a token's free places with whatever
    experts its top-k over the weights comes upon, at weight 0: sent, counted and multiplied for nothing. HybridEP takes
    the routing map itself and needs nothing.
    """

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        tokens = routing_map.shape[0]
        map_TE, probs_TE = (x.reshape(tokens, self.num_experts) for x in (routing_map, probs))
        # By the map, not by the weight: a head of paired zero experts that trains dispatches picks of weight 0.
        order_TE = probs_TE.detach().masked_fill(~map_TE, -1.0)
        index_TK = order_TE.topk(self.router_topk, dim=-1).indices
        free_TK = ~map_TE.gather(1, index_TK)
        self.token_probs = probs_TE.gather(1, index_TK).masked_fill(free_TK, 0.0)
        self.token_indices = index_TK.masked_fill(free_TK, -1)


TYPES = ("alltoall", "allgather", "flex")
BACKENDS = ("deepep", "hybridep")


class _ZeroSlots:
    """Shared by all dispatchers: adds what `copy` or `learned` zero experts contribute, and lets fused kernels
    permute only what they can.

    Transformer Engine's permute fails without rows, which a rank whose tokens all chose zero experts has: such a
    pass takes Megatron's unfused one. `config` is this dispatcher's own, so that others keep their setting.
    """

    zero_output = None
    _layer_input = None

    def __init__(self, *args, config, **kwargs):
        super().__init__(*args, config=copy.copy(config), **kwargs)
        self.fusion = config.moe_permute_fusion

    def _fuse(self, rows: bool) -> None:
        self.config.moe_permute_fusion = self.fusion and rows

    def dispatch_preprocess(self, hidden_states, routing_map, probs):
        if self.zero_output is not None:
            self._layer_input = hidden_states
        if self.fusion and probs.requires_grad and not hidden_states.requires_grad:
            # Transformer Engine computes no gradient of the weights unless the rows want one; below the first
            # router that trains, they do not.
            hidden_states = hidden_states.detach().requires_grad_()
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

    def dispatch_postprocess(self, hidden_states, probs):
        if self.fusion:
            local = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
            self._fuse(bool(self.routing_map[:, local].any()))
        return super().dispatch_postprocess(hidden_states, probs)


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

    def _maybe_dtoh_and_synchronize(self, point, tokens_per_expert=None):
        moved = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if self.fusion and point == "before_permutation_1":
            self._fuse(int(self.num_out_tokens) > 0)
        return moved

    def token_dispatch(self, *args, **kwargs):
        self._fuse(True)  # between the permutations chunks are sorted, which the kernels do for no rows too
        return super().token_dispatch(*args, **kwargs)

    def combine_postprocess(self, hidden_states):
        self._fuse(hidden_states.shape[0] > 0)
        output = super().combine_postprocess(hidden_states)
        self._fuse(True)
        return output


class ZeroExpertFlexDispatcher(_ZeroSlots, MoEFlexTokenDispatcher):
    """Megatron's flex dispatcher, whose backend hears of real slots only. Fusion needs no care here: DeepEP sends
    a token only where it has a slot."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        stock = self._comm_manager
        if isinstance(stock, _DeepepManager):
            self._comm_manager = RealSlotsDeepepManager(
                group=stock.group,
                num_local_experts=stock.num_local_experts,
                router_topk=stock.router_topk,
                num_experts=stock.num_experts,
                config=stock.config,
            )


_DISPATCHERS = {
    MoEAllGatherTokenDispatcher: ZeroExpertAllGatherDispatcher,
    MoEAlltoAllTokenDispatcher: ZeroExpertAlltoAllDispatcher,
    MoEFlexTokenDispatcher: ZeroExpertFlexDispatcher,
}


def check_dispatcher(
    kind: str,
    backend: str = "deepep",
    permute_fusion: bool = False,
    expert_ranks: int = 1,
    bf16: bool = False,
) -> None:
    """Raise `UserError` for a dispatcher that cannot run here, before anything is built.

    Args:
        expert_ranks: expert-parallel times expert-tensor-parallel size.
    """
    for flag, value, allowed in (
        ("--moe-token-dispatcher-type", kind, TYPES),
        ("--moe-flex-dispatcher-backend", backend, BACKENDS),
    ):
        if value not in allowed:
            raise UserError(f"{flag} {value!r} is unknown; choose one of {', '.join(allowed)}")
    if permute_fusion and not (moe_utils.HAVE_TE and moe_utils.fused_permute_with_probs):
        raise UserError(
            "--moe-permute-fusion needs Transformer Engine 2.1 or newer, which is not installed (CONTRIBUTING.md, "
            "extra te); leave the flag out"
        )
    if kind != "flex":
        return
    kernels = {"deepep": "fused_dispatch", "hybridep": "hybrid_ep_dispatch"}[backend]
    if getattr(token_dispatcher, kernels) is None:
        branch = {"deepep": "", "hybridep": ", branch hybrid-ep"}[backend]
        raise UserError(
            f"--moe-token-dispatcher-type flex needs the package deep_ep, which is not installed: build it from "
            f"github.com/deepseek-ai/DeepEP{branch}, or use alltoall"
        )
    if expert_ranks == 1:
        raise UserError(
            "--moe-token-dispatcher-type flex needs --expert-model-parallel-size above 1; use alltoall"
        )
    if not bf16:
        raise UserError("--moe-token-dispatcher-type flex needs --bf16: DeepEP exchanges bfloat16 only")


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
                "experts; use alltoall, allgather or flex"
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
