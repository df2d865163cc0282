"""vLLM's method for unquantised experts, given picks of zero experts too: they never reach a kernel."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from .routing import ZeroExpertGate, real_slots, zero_output

GPU_KERNELS = ("TritonExperts",)
"""Kernels that drop rows whose expert is not mapped (expert id -1 in the expert map)."""


class ZeroSkippingMoEMethod(UnquantizedFusedMoEMethod):
    """Experts of one MoE layer, of N real ones.

    On the CPU only real (token, slot) pairs are handed over: its kernel has no bounds check on ids. On a GPU the shapes
    stay (CUDA graphs), and an expert map says that the zero experts live on no rank, as in expert parallelism; this
    path was not run yet. What zero experts of another type than `zero` give is added behind the experts, by one
    rank of those that add up their outputs.

    Args:
        moe: vLLM's settings of the layer.
        gate: its router's weights.

    Raises:
        ValueError: kernels that would not skip.
    """

    def __init__(self, moe: FusedMoEConfig, gate: ZeroExpertGate):
        super().__init__(moe)
        self.num_real = gate.routing.num_real
        self._gate = [gate]  # in a list: the gate belongs to another module
        self._maps: tuple[torch.Tensor | None, torch.Tensor] | None = None
        self._refuse()

    def _refuse(self) -> None:
        parallel = self.moe.moe_parallel_config
        for on, what in (
            (
                parallel.use_all2all_kernels,
                "an all-to-all backend (data parallel with --enable-expert-parallel)",
            ),
            (parallel.enable_eplb, "--enable-eplb"),
            (parallel.is_sequence_parallel, "sequence-parallel MoE layers"),
            (self.moe.is_lora_enabled, "--enable-lora"),
            (current_platform.is_cpu() and parallel.use_ep, "--enable-expert-parallel on the CPU"),
        ):
            if on:
                raise ValueError(f"models with zero experts do not work with {what}: leave it off")
        name = self.experts_cls.__name__ if self.experts_cls else "none"
        if self.is_monolithic or not (current_platform.is_cpu() or name in GPU_KERNELS):
            raise ValueError(
                f"the MoE kernel {name} would not skip zero experts; choose --moe-backend triton "
                f"(known to skip: {', '.join(GPU_KERNELS)})"
            )

    def process_weights_after_loading(self, layer) -> None:
        """As vLLM, but weights that are loaded again are packed again on the CPU too."""
        if current_platform.is_cpu():
            self.moe_kernel = None
        super().process_weights_after_loading(layer)

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input) -> torch.Tensor:
        """[T, H] -> [T, H]. Ids lie in [0, N+Nz); no slot with an id from N on reaches an expert."""
        path = self._real_rows if current_platform.is_cpu() else self._unmapped
        output_TH = path(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        if get_tensor_model_parallel_rank() == 0:
            gate = self._gate[0]
            more_TH = zero_output(x[:, : gate.weight.shape[1]], topk_weights, topk_ids, gate)
            if more_TH is not None:
                # vLLM pads the width of x where a kernel wants it.
                output_TH = output_TH + F.pad(more_TH, (0, x.shape[1] - more_TH.shape[1]))
        return output_TH.to(x.dtype)

    def _unmapped(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        """All zero experts get one id, and the expert map says it is on no rank."""
        is_real_TK = topk_ids < self.num_real
        return self._kernel(
            layer,
            x,
            torch.where(is_real_TK, topk_weights, 0),
            torch.where(is_real_TK, topk_ids, self.num_real),
            self.num_real + 1,
            self._expert_map(layer, x.device),
            shared_experts,
            shared_experts_input,
        )

    def _real_rows(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        """Every real slot is a row of its own; float32."""
        output_TH = torch.zeros_like(x, dtype=torch.float32)
        token_R, ids_R1, weights_R1 = real_slots(topk_ids, topk_weights, self.num_real)
        if token_R.numel() == 0:
            return output_TH
        rows_RH = self._kernel(
            layer,
            x[token_R],
            weights_R1,
            ids_R1,
            self.num_real,
            None,
            shared_experts,
            shared_experts_input,
        )
        return output_TH.index_add_(0, token_R, rows_RH.float())

    def _kernel(self, layer, x, weights, ids, num_experts, expert_map, shared_experts, shared_experts_input):
        return self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=weights,
            topk_ids=ids,
            activation=layer.activation,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=num_experts,
            expert_map=expert_map,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )

    def _expert_map(self, layer, device: torch.device) -> torch.Tensor:
        """vLLM's map of expert ids to local ones, and one entry more for all zero experts: -1."""
        base = layer.expert_map
        if self._maps is None or self._maps[0] is not base:
            if base is None:
                local = torch.arange(self.num_real, dtype=torch.int32, device=device)
            else:
                local = base.to(torch.int32)
            self._maps = base, torch.cat([local, local.new_full((1,), -1)])
        return self._maps[1]
