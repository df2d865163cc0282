"""Hugging Face folders with random weights of any geometry, written fast: for measuring conversions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.file_writer import FileWriter
from zeda_megatron.convert.layout import model_layout
from zeda_megatron.convert.safetensors_shards import (
    DEFAULT_SHARD_BYTES,
    Planned,
    Shard,
    plan_shards,
    write_index,
)
from zeda_megatron.models.architecture import dims_of, read_architecture, weight_map_of
from zeda_megatron.runtime.whole_folder import staged_folder

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Geometry of the published model (its config.json)."""
_BLOCK = 64 << 20


def write_random_model(
    folder: str | os.PathLike,
    config: dict[str, Any],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    workers: int = 1,
) -> int:
    """Write config.json and shards; returns the bytes of all weights.

    The bits are random (NaN among them), for conversions alone. Each tensor is another stretch of one random block.
    """
    arch = read_architecture(config)
    weights, dims = weight_map_of(arch), dims_of(arch)
    planned = [
        Planned(key, dtype, shapes[0], None)
        for parameter in model_layout(arch, ZeroExpertConfig()).parameters
        for key, shapes in weights.for_mcore_name(parameter.name).hf_shapes(parameter.shape, dims).items()
    ]
    block = torch.randint(256, (_BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

    def made(shard: Shard) -> Iterator[torch.Tensor]:
        for plan in shard.tensors:
            start = int.from_bytes(hashlib.sha256(plan.key.encode()).digest()[:4], "little") % (_BLOCK // 2)
            bytes_ = block[start : start + plan.nbytes]
            times = -(-plan.nbytes // max(len(bytes_), 1))
            yield bytes_.repeat(times)[: plan.nbytes].view(dtype).view(plan.shape)

    shards = plan_shards(planned, max_shard_bytes)
    with staged_folder(Path(folder), {"random": config, "seed": seed, "shards": max_shard_bytes}) as staging:
        if staging is not None:
            FileWriter(staging, shards, workers, "random").run(
                lambda shard, stream: shard.write(stream, made(shard))
            )
            write_index(staging.work, shards)
            (staging.work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sum(plan.nbytes for plan in planned)
