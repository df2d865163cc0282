"""Puts zero experts into the MoE layers of a model that vLLM has just built; its experts stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index, sequence_parallel_chunk
from vllm.platforms import current_platform

from .meter import SlotCounter, ZeroShareMeter
from .request_dials import RequestDials
from .routing import ZeroExpertGate, pick
from .settings import read_routing
from .skipping import ANYWAY, skip_zero_experts


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
            RequestDials.added_to(self.gate.dial, len(router_logits)),
            self.scaled,
            _padding(len(router_logits)),
        )
        self.counter.count(ids_TK, self.routing.num_real)
        return weights_TK, ids_TK.to(torch.int32 if indices_type is None else indices_type)


@dataclass(frozen=True)
class Names:
    """What a family calls things in its layers."""

    block: str = "mlp"
    """A layer's MoE block."""
    router: str = "gate"
    """The block's router."""
    block_has_score_bias: bool = False
    """The bias that chooses is a parameter of the block, not of its router."""


class ZeroExpertMoeBlock(nn.Module):
    """A stock MoE block whose gate knows zero experts. The gate's columns travel with the hidden states.

    Args:
        names: see `Names`.
    """

    def __init__(self, gate: ZeroExpertGate, stock: nn.Module, names: Names):
        super().__init__()
        self.add_module(names.router, gate)
        self._router = names.router
        for name in ("shared_experts", "shared_expert", "shared_expert_gate"):
            if getattr(stock, name, None) is not None:
                setattr(self, name, getattr(stock, name))
        if names.block_has_score_bias:
            bias = gate._parameters.pop("e_score_correction_bias")
            self.e_score_correction_bias = bias
            object.__setattr__(gate, "e_score_correction_bias", bias)  # to be read; its name is the block's
        self.experts = stock.experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        columns_TC = self._modules[self._router](hidden_states)
        if not self.experts.moe_config.is_sequence_parallel:
            return self.experts(hidden_states=hidden_states, router_logits=columns_TC)
        # Ranks of a tensor-parallel group have the same tokens: each takes a part of them to the experts.
        part_TH, part_TC = sequence_parallel_chunk(hidden_states), sequence_parallel_chunk(columns_TC)
        output_TH = self.experts(hidden_states=part_TH, router_logits=part_TC)
        return tensor_model_parallel_all_gather(output_TH, 0)[: len(hidden_states)]


def prefer_skipping_kernels(vllm_config: VllmConfig) -> None:
    """Before a model is built: on a GPU, where vLLM would choose a kernel, take Triton's, which skips in every number
    format that it has."""
    kernels = vllm_config.kernel_config
    if not current_platform.is_cpu() and kernels.moe_backend == "auto":
        kernels.moe_backend = "triton"


def install_zero_experts(
    layers: nn.ModuleList,
    block_class: type,
    config,
    vllm_config: VllmConfig,
    numbers: list[int],
    names: Names,
) -> ZeroShareMeter:
    """Replace the MoE blocks of these decoder layers; returns the meter of their zero share.

    Args:
        layers: decoder layers of this pipeline rank (others are placeholders).
        block_class: the stock MoE block. config: the Hugging Face config. numbers: of all MoE layers of the model.
        names: what the family calls things.

    Raises:
        ValueError: the config makes no sense, or vLLM's settings would not skip zero experts.
    """
    extra = vllm_config.additional_config if isinstance(vllm_config.additional_config, dict) else {}
    routings = dict(zip(numbers, read_routing(config, len(numbers), extra)))
    counters = {}
    for layer in layers:
        stock = getattr(layer, names.block, None)
        if not isinstance(stock, block_class):
            continue
        number = extract_layer_index(stock.experts.layer_name)
        gate = ZeroExpertGate(routings[number], config.hidden_size, vllm_config.model_config.dtype)
        counters[number] = SlotCounter()
        _rewire(stock.experts, gate, counters[number], bool(extra.get(ANYWAY)))
        setattr(layer, names.block, ZeroExpertMoeBlock(gate, stock, names))
        if gate.routing.needs_residual:
            layer.post_attention_layernorm.register_forward_hook(_show_residual(gate))
    return ZeroShareMeter(counters, float(extra.get("zeda_metric_seconds", 10.0)))


def set_dials(model: nn.Module, values: list[float]) -> None:
    """Turn the dial of every MoE layer of a running model: its threshold (paired) or logit bias (shared).

        llm.apply_model(lambda model: set_dials(model, [-2.5] * moe_layers))

    `ValueError` if there are not as many numbers as MoE layers.
    """
    gates = [module for module in model.modules() if isinstance(module, ZeroExpertGate)]
    if len(values) != len(gates):
        raise ValueError(f"{len(values)} numbers for {len(gates)} MoE layers")
    for gate, value in zip(gates, values):
        gate.dial.fill_(value)


def _rewire(runner: MoERunner, gate: ZeroExpertGate, counter: SlotCounter, anyway: bool) -> None:
    runner.gate = None  # the block's gate comes before the runner
    runner.router = ZeroExpertRouter(gate, counter, runner_scales=runner.routed_scaling_factor != 1.0)
    # On the CPU vLLM would trace through its runner, but how many slots are real is not known while tracing.
    shared = runner.shared_experts is not None
    runner._forward_entry = torch.ops.vllm.moe_forward_shared if shared else torch.ops.vllm.moe_forward
    skip_zero_experts(runner.routed_experts, gate, anyway)


def _padding(tokens: int) -> torch.Tensor | None:
    """Which of the tokens of this pass only fill up a batch; None if none does, or nobody says."""
    found = get_forward_context().is_padding if is_forward_context_available() else None
    return found if found is not None and len(found) == tokens else None


def _show_residual(gate: ZeroExpertGate):
    def hook(_norm, _args, output):
        gate.see_residual(output[1])  # vLLM's norm returns (normed, stream)

    return hook
