"""The router object that vLLM's MoE runner asks for picks."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from .meter import SlotCounter
from .routing import ZeroExpertGate, pick


class ZeroExpertRouter(BaseRouter):
    """Picks among real and zero experts from a gate's columns; ids are raw, in [0, N+Nz), so that vLLM's capture of
    routed experts tells which zero expert was picked.

    Args:
        runner_scales: the runner multiplies its output by the model's scaling factor itself.
    """

    def __init__(self, gate: ZeroExpertGate, counter: SlotCounter, runner_scales: bool):
        super().__init__(top_k=gate.routing.top_k, global_num_experts=gate.routing.num_real)
        self.routing, self.gate, self.counter, self.scaled = gate.routing, gate, counter, not runner_scales

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Custom

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights_TK, ids_TK = pick(
            router_logits,
            self.routing,
            hidden_states.dtype,
            getattr(self.gate, "e_score_correction_bias", None),
            self.gate.dial,
            self.scaled,
        )
        self.counter.count(ids_TK, self.routing.num_real)
        return weights_TK, ids_TK.to(torch.int32 if indices_type is None else indices_type)
