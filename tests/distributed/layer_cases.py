"""Single MoE layers on several ranks, with stand-ins for kernels that need GPUs; and whole runs on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from deepep_buffer import install
from dense_layer import ROUTINGS, SITUATIONS, compare, zero_config
from fused_kernels import FusedKernels
from megatron.core.parallel_state import get_expert_tensor_and_model_parallel_group

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.moe import dispatch


def each_routing():
    """(routing, situation) that make sense together."""
    return [
        (routing, situation)
        for routing in ROUTINGS
        for situation in SITUATIONS
        if situation == "plain" or routing in ("shared", "paired")
    ]


def layer_on(layout: dict, routing: str, **overrides):
    """This rank's part of a layer: experts spread over the ranks (ep) or cut (etp)."""
    ranks = torch.distributed.get_world_size()
    if layout.get("etp"):
        sizes = {"tensor_model_parallel_size": ranks, "expert_tensor_parallel_size": ranks}
        sizes |= {"sequence_parallel": True}
    else:
        sizes = {"expert_model_parallel_size": ranks}
    return tiny.moe_layer(zero_config(routing), sizes | overrides)


def compared(layout: dict, routing: str, situation: str, **overrides) -> dict:
    """One layer on all stand-ins against the dense one; also what the kernels were asked for."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        kernels = FusedKernels().install(patch)
        deepep, hybrid = install(patch, get_expert_tensor_and_model_parallel_group())
        layer = layer_on(layout, routing, **overrides)
        made = compare(layer, routing, situation, rank, ranks, sliced="etp" in layout)
    named = sum(int((indices >= 0).sum()) for indices in deepep.indices_seen)
    named += sum(int(seen.sum()) for seen in hybrid.maps_seen)
    return made | {"allocated": kernels.allocated, "named": named}


def fused(world, out: Path, layout: dict, flags: dict) -> dict:
    """Every routing through fused permutation, against the dense layer over all ranks."""
    overrides = {"moe_token_dispatcher_type": flags["dispatcher"], "moe_permute_fusion": True}
    return {f"{r}, {s}": compared(layout, r, s, **overrides) for r, s in each_routing()}


def flex(world, out: Path, layout: dict, flags: dict) -> dict:
    """Every routing through the flex dispatcher, with the permutation unfused and fused."""
    overrides = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": flags["backend"]}
    return {
        f"{r}, {s}{', fused' * fusion}": compared(layout, r, s, **overrides, moe_permute_fusion=fusion)
        for r, s in each_routing()
        for fusion in (False, True)
    }


def stock_flex(world, out: Path, layout: dict, flags: dict) -> dict:
    """Rows, counts and differences with Megatron's own manager of DeepEP in our dispatcher's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "RealSlotsDeepepManager", dispatch._DeepepManager)
        overrides = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
        return {r: compared(layout, r, "plain", **overrides) for r in ("shared", "paired", "topk")}


def zero_outputs(world, out: Path, layout: dict, flags: dict) -> dict:
    """`copy` and `learned` zero experts through the flex dispatcher: worst `tiny.gap` to all-to-all."""
    worst = {}
    for kind in ("copy", "learned"):
        ends = []
        for dispatcher in ("alltoall", "flex"):
            with pytest.MonkeyPatch.context() as patch:
                install(patch, get_expert_tensor_and_model_parallel_group())
                sizes = {"expert_model_parallel_size": torch.distributed.get_world_size()}
                layer = tiny.moe_layer(
                    ZeroExpertConfig(4, zero_experts_type=kind),
                    sizes | {"moe_token_dispatcher_type": dispatcher},
                )
                hidden = tiny.hidden_states(seed=1 + torch.distributed.get_rank())
                output, _ = layer(hidden)
                output.square().sum().backward()
            ends.append([output, hidden.grad, *(p.grad for p in layer.parameters())])
        worst[kind] = max(tiny.gap(b, a) for a, b in zip(*ends, strict=True))
        without = tiny.moe_layer(ZeroExpertConfig(4), sizes)
        worst[f"{kind} adds"] = float((output - without(hidden)[0]).detach().abs().max())
    return worst
