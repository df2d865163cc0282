"""Picks of zero experts and vLLM's expert kernels: to a kernel all zero experts are one more expert, of no rank.

vLLM's kernels know experts of other ranks: an expert map (global id -> local id, -1 where it is another rank's) says
which they are, and their slots are dropped while rows are sorted. Zero experts get the id N behind the N real ones, and
-1 in the map. Weights, scales and number format are the stock method's business, which is not replaced. (The id -1
alone would not do: Triton's kernel then leaves rows unwritten without knowing it, and adds them up; with one scale for
all activations it would also measure them. With the map it writes zeros there, or leaves them out in both places.)

A dispatch over an all-to-all library sends a slot to its expert's rank, and knows as "nobody" the id -1 alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform

from .routing import ZeroExpertGate, zero_output

GATHERED = "allgather_reducescatter"
"""The all-to-all backend that gathers every token on every rank: ids travel as they are."""
SKIPPING_KERNELS = (
    *("TritonExperts", "TritonWNA16Experts", "DeepGemmExperts", "TritonOrDeepGemmExperts", "MarlinExperts"),
)
"""Kernels of GPUs that drop a slot whose expert the map puts on no rank, so their source says (vLLM 0.32)."""
ANYWAY = "zeda_unproved_backends"
"""Key of --additional-config: take kernels and backends of which this is not known."""


def skipped_id(parallel: FusedMoEParallelConfig, num_real: int) -> int:
    """The id of a skipped pick toward the engine."""
    return -1 if parallel.use_all2all_kernels and parallel.all2all_backend != GATHERED else num_real


def skip_zero_experts(experts: RoutedExperts, gate: ZeroExpertGate, anyway: bool) -> None:
    """Let the experts of a layer that vLLM has built leave out picks of zero experts.

    Raises:
        ValueError: with these settings they would be computed, or it is not known; `anyway` takes the latter.
    """
    _refuse(experts, anyway)
    method, num_real, base = experts.quant_method, gate.routing.num_real, experts._expert_map
    local = torch.arange(num_real, dtype=torch.int32) if base is None else base.to(torch.int32)
    experts._expert_map = torch.cat([local, local.new_full((1,), -1)])
    experts.global_num_experts = num_real + 1
    method.apply = _with_zero_experts(method, gate)
    if current_platform.is_cpu():
        method.process_weights_after_loading = _on_real_rows(method)


def _with_zero_experts(method: FusedMoEMethodBase, gate: ZeroExpertGate):
    """The method's `apply` for raw ids: [T, H] -> [T, H]. What zero experts of another kind than `zero` give is added
    behind the experts, once among the ranks that add up their outputs."""
    stock, num_real, width = method.apply, gate.routing.num_real, gate.weight.shape[1]
    skipped = skipped_id(method.moe.moe_parallel_config, num_real)

    def apply(*, x, topk_weights, topk_ids, **more):
        ids_TK = topk_ids.masked_fill(topk_ids >= num_real, skipped)
        output_TH = stock(x=x, topk_weights=topk_weights, topk_ids=ids_TK, **more)
        whole = method.moe.is_sequence_parallel or method.moe_kernel.output_is_reduced()
        if not whole and get_tensor_model_parallel_rank() > 0:
            return output_TH
        more_TH = zero_output(x[:, :width], topk_weights, topk_ids, gate)
        if more_TH is None:
            return output_TH
        # vLLM pads the width of x where a kernel wants it.
        return (output_TH + F.pad(more_TH, (0, x.shape[1] - width))).to(x.dtype)

    return apply


def _on_real_rows(method: FusedMoEMethodBase):
    """The method's `process_weights_after_loading`, after which its CPU kernel meets real slots alone."""
    stock = method.process_weights_after_loading

    def process(layer) -> None:
        method.moe_kernel = None  # weights that are loaded again are packed again too
        stock(layer)
        experts = method.moe_kernel.fused_experts
        experts.apply = partial(_real_rows, experts.apply)

    return process


def _real_rows(kernel, *, output, hidden_states, w1, topk_weights, topk_ids, expert_map, **more) -> None:
    """vLLM's C++ kernels of a CPU check no bounds and read no expert map: every slot of an expert of this rank becomes
    a row of its own, and they see nothing else."""
    local_TK = expert_map[topk_ids.long()]
    token_R, place_R = (local_TK >= 0).nonzero(as_tuple=True)
    sum_TH = torch.zeros_like(output, dtype=torch.float32)
    if token_R.numel():
        rows_RH = torch.empty(len(token_R), output.shape[1], dtype=output.dtype)
        more |= {"global_num_experts": len(w1), "expert_map": None}
        kernel(
            output=rows_RH,
            hidden_states=hidden_states[token_R],
            w1=w1,
            topk_weights=topk_weights[token_R, place_R].unsqueeze(1),
            topk_ids=local_TK[token_R, place_R].unsqueeze(1).to(topk_ids.dtype),
            **more,
        )
        sum_TH.index_add_(0, token_R, rows_RH.float())
    output.copy_(sum_TH)


def _refuse(experts: RoutedExperts, anyway: bool) -> None:
    method, moe = experts.quant_method, experts.moe_config
    parallel, kernel = moe.moe_parallel_config, getattr(method, "experts_cls", None)
    for on, what in (
        (parallel.enable_eplb, "--enable-eplb (which knows the real experts alone)"),
        (moe.is_lora_enabled, "--enable-lora (its kernels sort every slot)"),
    ):
        if on:
            raise ValueError(f"models with zero experts do not work with {what}: leave it off")
    name = kernel.__name__ if kernel else type(method).__name__
    if method.is_monolithic:
        raise ValueError(
            f"the MoE kernel {name} routes by itself, over the real experts: --moe-backend triton"
        )
    if anyway:
        return
    if parallel.use_all2all_kernels and parallel.all2all_backend != GATHERED:
        raise ValueError(
            f"--all2all-backend {parallel.all2all_backend} was never run with zero experts: {GATHERED} was, or set "
            f"{ANYWAY} in --additional-config"
        )
    if not current_platform.is_cpu() and name not in SKIPPING_KERNELS:
        raise ValueError(
            f"it is not known that the MoE kernel {name} skips zero experts: --moe-backend triton does (or "
            f"{ANYWAY} in --additional-config)"
        )
