"""Single MoE layers on several ranks, with stand-ins for kernels that need GPUs; and whole runs on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from deepep_buffer import install
from dense_layer import ROUTINGS, SITUATIONS, compare, zero_config
from fused_kernels import FusedKernels
from megatron.core.parallel_state import get_expert_model_parallel_group


def each_routing():
    """(routing, situation) that make sense together."""
    return [
        (routing, situation)
        for routing in ROUTINGS
        for situation in SITUATIONS
        if situation == "plain" or routing in ("shared", "paired")
    ]


def fused(world, out: Path, layout: dict, flags: dict) -> dict:
    """Every routing through fused permutation, against the dense layer over all ranks."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    overrides = {
        "moe_token_dispatcher_type": flags["dispatcher"],
        "moe_permute_fusion": True,
        "expert_model_parallel_size": ranks,
    }
    made = {}
    for routing, situation in each_routing():
        with pytest.MonkeyPatch.context() as patch:
            kernels = FusedKernels().install(patch)
            layer = tiny.moe_layer(zero_config(routing), overrides)
            result = compare(layer, routing, situation, rank, ranks)
        made[f"{routing}, {situation}"] = result | {"allocated": kernels.allocated}
    return made


def flex(world, out: Path, layout: dict, flags: dict) -> dict:
    """Every routing through the flex dispatcher, with the permutation unfused and fused."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    overrides = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": flags["backend"],
        "expert_model_parallel_size": ranks,
    }
    made = {}
    for routing, situation in each_routing():
        for fusion in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                kernels = FusedKernels().install(patch)
                install(patch, get_expert_model_parallel_group())
                layer = tiny.moe_layer(zero_config(routing), overrides | {"moe_permute_fusion": fusion})
                result = compare(layer, routing, situation, rank, ranks)
            made[f"{routing}, {situation}{', fused' * fusion}"] = result | {"allocated": kernels.allocated}
    return made
