"""Layer specs: `apply_zero_experts` gives any Megatron GPT layer spec zero experts, without forking a layer."""

from __future__ import annotations

import copy
from functools import partial

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..config.zero_experts import ZeroExpertConfig
from ..runtime.megatron_api import moe_submodules, replace_experts
from .experts import GroupedExperts
from .router import ZeroExpertRouter


def apply_zero_experts(spec, zero: ZeroExpertConfig, expert_backend: str | None = None):
    """Return a copy of a layer spec (or block spec) whose MoE layers route over zero experts too.

    Args:
        spec: a `ModuleSpec` of a transformer layer, a `TransformerBlockSubmodules`, or a list of layer specs.
            Dense layers pass through unchanged.
        zero: the zero experts. `num_zero_experts=0` is fine: the router then routes like the stock one, but
            counts slots and takes pick rules.
        expert_backend: if given, `SequentialMLP` experts become `GroupedExperts` with this backend
            (`auto`, `kernels`, `grouped_mm`, `loop`).

    After building the model call `moe.dispatch.install_dispatchers(model)`.
    """
    if isinstance(spec, list):
        return [apply_zero_experts(layer, zero, expert_backend) for layer in spec]
    spec = copy.deepcopy(spec)
    if isinstance(spec, TransformerBlockSubmodules):
        spec.layer_specs = apply_zero_experts(spec.layer_specs, zero, expert_backend)
        return spec
    moe = moe_submodules(spec)
    if moe is None:
        return spec
    moe.router = partial(ZeroExpertRouter, zero=zero)
    _use_grouped_experts(moe, expert_backend)
    return spec


def apply_grouped_experts(
    spec: TransformerBlockSubmodules, expert_backend: str
) -> TransformerBlockSubmodules:
    """Return a copy of a block spec whose `SequentialMLP` experts are `GroupedExperts`; routers stay stock."""
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs:
        moe = moe_submodules(layer)
        if moe is not None:
            _use_grouped_experts(moe, expert_backend)
    return spec


def _use_grouped_experts(moe, expert_backend: str | None) -> None:
    if expert_backend is not None:
        replace_experts(moe, SequentialMLP, GroupedExperts, backend=expert_backend)


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
